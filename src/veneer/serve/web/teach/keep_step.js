// Step 5: the adapter gets a name in the library, where it is a model of this server at once.

/** Returns a name that the library accepts, made of the file's. */
function nameFrom(file) {
  const stem = file.replace(/\.[^.]*$/, "").toLowerCase();
  return stem.replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 40) || "adapter";
}

function showKeep() {
  byId("keep-name").value = lesson.draft.model ?? nameFrom(lesson.draft.name);
  showKept();
  followExport();
  findQuestion();
}

/** Finds a held-out question for the commands that use the adapter. */
async function findQuestion() {
  const { id } = lesson.draft;
  await teachSafely(async () => {
    const { questions } = await studio(draftPath("/held_out"));
    if (lesson.draft?.id !== id) return; // other rows were opened meanwhile
    lesson.question = questions[0]?.messages ?? null;
    showKept();
  });
}

function showKept() {
  const { model } = lesson.draft;
  byId("kept").hidden = !model;
  if (!model) return byId("keep-said").replaceChildren();
  const base = training.job?.base;
  const answers = !base || base.served;
  byId("keep-ask").hidden = byId("keep-code").hidden = !answers;
  byId("keep-said").textContent = `${lesson.draft.reference ?? model} is in the library${answers ? ", and a model of this server." : "."}`;
  if (!answers) {
    const reason = ` It was trained on ${base.name}, so it is no model of this server, which answers with ${served.base}. Serve it: `;
    byId("keep-said").append(reason, make("code", {}, base.command));
  }
  const question = lesson.question ?? [{ role: "user", content: "…" }];
  const body = bodyOf({ name: model, weight: 1 }, question, { max_tokens: 96 });
  byId("keep-curl").textContent = curlOf(body);
  byId("keep-python").textContent = pythonOf(body);
}

async function keep(event) {
  event.preventDefault();
  const name = byId("keep-name").value.trim();
  await teachSafely(async () => {
    const draft = await studio(draftPath("/keep"), { body: { name } });
    Object.assign(lesson.draft, draft);
    judging.model = draft.model;
    await loadModels();
  });
  showKept();
}

/** Downloads a file of the draft's result. rest: the end of its address */
async function download(rest) {
  await teachSafely(async () => {
    const response = await request(`/studio/api${draftPath(rest)}`);
    const named = response.headers.get("content-disposition").split("''")[1];
    saveBlob(decodeURIComponent(named), await response.blob());
  });
}

function askKept() {
  if (!chosen.some((column) => column.name === lesson.draft.model)) {
    if (chosen.length === MOST_ADAPTERS) chosen.pop();
    addColumn(lesson.draft.model);
  }
  openTab("ask");
}

function beginKeep() {
  byId("keep-form").addEventListener("submit", keep);
  byId("keep-ask").addEventListener("click", askKept);
  for (const button of document.querySelectorAll("#kept [data-file]"))
    button.addEventListener("click", () => download(`/files/${button.dataset.file}`));
  whenStepShown.keep = showKeep;
}
beginKeep();
