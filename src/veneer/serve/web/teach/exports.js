// Exports the adapter for another program, as a file to download.

const EXPORTS = {
  llamacpp: "llama.cpp, base and adapter as one model",
  llamacpp_adapter: "llama.cpp, the adapter alone",
  ollama: "Ollama, base and adapter as one model",
};
const MODEL_TYPES = { q8_0: "8 bits (q8_0)", f16: "16 bits (f16)" };
/** state: of the draft's export. ends: stops following it. */
const exporting = { state: {}, ends: null };

/** Shows the export of the draft, and follows it. body: starts another export. */
async function showExport(body) {
  exporting.ends?.abort();
  const { signal } = (exporting.ends = new AbortController());
  exporting.state = {};
  const path = draftPath("/export");
  await teachSafely(async () => {
    const isOpen = updateExport(await studio(path, { body, signal }));
    if (isOpen) await followEvents(() => `${path}/events`, updateExport, signal);
  });
}

/** Shows what changed in the export's state. Returns whether it goes on. */
function updateExport(changes) {
  const state = Object.assign(exporting.state, changes);
  keepFocus(["#export-stop", "#export-start"], () => {
    byId("export-start").hidden = state.open;
    byId("export-stop").hidden = !state.open;
  });
  byId("export-said").textContent = workStatus(state, "Exporting");
  byId("export-said").className = state.error ? "fault bad" : "fault soft";
  if (changes.request) showExportChoice(changes.request);
  const isDone = !state.open && state.export;
  byId("exported").replaceChildren(...(isDone ? exportedFile(state.export) : []));
  return state.open;
}

/** Shows the choices with which the last export was started. */
function showExportChoice({ to, type }) {
  if (to) byId("export-to").value = to;
  if (type) byId("export-type").value = type;
  showExportType();
}

function exportedFile({ file, bytes: size, notes, commands }) {
  const text = `Download ${file}, ${bytes(size)}`;
  const onclick = () => download("/export/file");
  const button = make("button", { className: "main", onclick }, text);
  const notesShown = notes.map((note) => make("p", { className: "soft" }, note));
  const unpack = file.endsWith(".zip") ? [`unzip ${file}`] : [];
  const code = make("pre", {}, [...unpack, ...commands].join("\n"));
  return [make("div", { className: "actions" }, button), ...notesShown, code];
}

function showExportType() {
  byId("export-type-label").hidden = byId("export-to").value === "llamacpp_adapter";
}

async function stopExport() {
  await teachSafely(() => studio(draftPath("/stop_work"), { body: { kind: "export" } }));
  await showExport();
}

function beginExports() {
  byId("export-to").append(...optionsOf(EXPORTS));
  byId("export-type").append(...optionsOf(MODEL_TYPES));
  byId("export-to").addEventListener("change", showExportType);
  const chosenExport = () => ({ to: byId("export-to").value, type: byId("export-type").value });
  byId("export-start").addEventListener("click", () => showExport(chosenExport()));
  byId("export-stop").addEventListener("click", stopExport);
  whenStepLeft.keep = () => exporting.ends?.abort();
}
beginExports();
