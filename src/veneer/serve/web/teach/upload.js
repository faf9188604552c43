// Uploads a file of rows, or pasted text, and opens it.

async function uploadRows(name, file) {
  const status = byId("upload-said");
  status.textContent = `Sending ${name}, ${bytes(file.size)} …`;
  let draft = null;
  const sent = await teachSafely(async () => {
    draft = await studio(`/drafts?name=${encodeURIComponent(name)}`, { file });
    await listDrafts();
  });
  status.textContent = "";
  if (sent) await openDraft(draft.id);
}

/** Guesses by the first character how pasted rows are written. */
function pastedName(text) {
  const first = text.trimStart()[0];
  return first === "[" ? "pasted.json" : first === "{" ? "pasted.jsonl" : "pasted.csv";
}

function beginUpload() {
  const area = byId("step-rows");
  const drop = byId("drop");
  const carriesFile = (event) => event.dataTransfer.types.includes("Files");
  area.addEventListener("dragover", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    drop.classList.add("over");
  });
  for (const name of ["dragleave", "drop"]) area.addEventListener(name, () => drop.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) uploadRows(file.name, file);
  });
  byId("rows-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) uploadRows(file.name, file);
  });
  byId("paste-use").addEventListener("click", () => {
    const text = byId("paste-text").value;
    if (text.trim()) uploadRows(pastedName(text), new Blob([text]));
  });
}
beginUpload();
