// Exports the adapter for another program, as a file to download.

const EXPORTS = {
  llamacpp: "llama.cpp, base and adapter as one model",
  llamacpp_adapter: "llama.cpp, the adapter alone",
  ollama: "Ollama, base and adapter as one model",
};
const MODEL_TYPES = { q8_0: "8 bits (q8_0)", f16: "16 bits (f16)" };
/** ends: stops looking at the export. */
const exporting = { ends: null };

/** Shows the export, and follows it while it runs. body: starts another one. */
async function followExport(body) {
  exporting.ends?.abort();
  const { signal } = (exporting.ends = new AbortController());
  await teachSafely(async () => {
    if (body) showExport(await studio(draftPath("/export"), { body, signal }));
    await followWork(draftPath("/export"), showExport, signal);
  });
}

function showExport(state) {
  const works = WORKING.includes(state.state);
  byId("export-start").hidden = works;
  byId("export-stop").hidden = !works;
  byId("export-said").textContent = workSaid(state, "Exporting");
  byId("export-said").className = state.error ? "fault bad" : "fault soft";
  byId("exported").replaceChildren(...(works || !state.export ? [] : exportShown(state.export)));
}

function exportShown(made) {
  const fetchFile = () => download("/export/file");
  const button = make("button", { className: "main", onclick: fetchFile }, `Download ${made.file}, ${bytes(made.bytes)}`);
  const notes = made.notes.map((note) => make("p", { className: "soft" }, note));
  const unpack = made.file.endsWith(".zip") ? [`unzip ${made.file}`] : [];
  const commands = make("pre", {}, [...unpack, ...made.commands].join("\n"));
  return [make("div", { className: "actions" }, button), ...notes, commands];
}

function showExportType() {
  byId("export-type-label").hidden = byId("export-to").value === "llamacpp_adapter";
}

async function stopExport() {
  await teachSafely(() => studio(draftPath("/stop_work"), { body: { kind: "export" } }));
  await followExport();
}

function beginExports() {
  byId("export-to").append(...optionsOf(EXPORTS));
  byId("export-type").append(...optionsOf(MODEL_TYPES));
  byId("export-to").addEventListener("change", showExportType);
  const chosenExport = () => ({ to: byId("export-to").value, type: byId("export-type").value });
  byId("export-start").addEventListener("click", () => followExport(chosenExport()));
  byId("export-stop").addEventListener("click", stopExport);
  whenStepLeft.keep = () => exporting.ends?.abort();
}
beginExports();
