// Uploads a file of rows, or pasted text, and opens it.

async function uploadRows(name, file) {
  const status = byId("upload-said");
  status.textContent = `Sending ${name}, ${bytes(file.size)} …`;
  let draft = null;
  const isSent = await teachSafely(async () => {
    draft = await studio(`/drafts?name=${encodeURIComponent(name)}`, { file });
    await listDrafts();
  });
  status.textContent = "";
  if (isSent) await openDraft(draft.id);
}

/** Names pasted rows by their first character, because the name decides how they are read. */
function pastedName(text) {
  const first = text.trimStart()[0];
  return { "[": "pasted.json", "{": "pasted.jsonl" }[first] ?? "pasted.csv";
}

/** Calls a function with each file that is dropped on an area. mark: shows where it falls */
function takeDroppedFiles(area, mark, take) {
  const carriesFile = (event) => event.dataTransfer.types.includes("Files");
  area.addEventListener("dragover", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    mark.classList.add("over");
  });
  for (const name of ["dragleave", "drop"])
    area.addEventListener(name, () => mark.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  });
}

/** Calls a function with the file that a field chooses; the same file can be chosen again. */
function takeChosenFile(field, take) {
  field.addEventListener("change", () => {
    const [file] = field.files;
    if (file) take(file);
    field.value = "";
  });
}

function beginUpload() {
  const uploadFile = (file) => uploadRows(file.name, file);
  takeDroppedFiles(byId("step-rows"), byId("drop"), uploadFile);
  takeChosenFile(byId("rows-file"), uploadFile);
  byId("paste-use").addEventListener("click", () => {
    const text = byId("paste-text").value;
    if (text.trim()) uploadRows(pastedName(text), new Blob([text]));
  });
}
beginUpload();
