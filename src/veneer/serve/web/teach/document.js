// The document that the teacher of objective distil reads: a text file of the draft.

function showDocument() {
  const { document: stored } = lesson.draft;
  byId("document-name").textContent = stored ? `${stored.name}, ${bytes(stored.bytes)}` : "none";
  byId("document-remove").hidden = !stored;
}

/** Sends a change of the document, and plans the run again. */
async function changeDocument(path, settings) {
  const isChanged = await teachSafely(async () => {
    const { document: stored } = await studio(draftPath(`/document${path}`), settings);
    lesson.draft.document = stored;
  });
  showDocument();
  if (isChanged) await planChosen();
}

function beginDocument() {
  const send = (file) => changeDocument(`?name=${encodeURIComponent(file.name)}`, { file });
  takeDroppedFiles(byId("document-field"), byId("document-field"), send);
  takeChosenFile(byId("document-file"), send);
  byId("document-remove").addEventListener("click", () => changeDocument("/remove", { body: {} }));
}
beginDocument();
