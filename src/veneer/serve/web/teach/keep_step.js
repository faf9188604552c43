// Step 5: the adapter gets a name in the library, where it is a model of this server at once.

/** The status of a request that would add a version to an adapter of the library. */
const NAME_TAKEN = 409;

/** Returns a name that the library accepts, made of the file's. */
function nameFrom(file) {
  const stem = file.replace(/\.[^.]*$/, "").toLowerCase();
  const name = stem.replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  return name.slice(0, 40) || "adapter";
}

function showKeep() {
  byId("keep-name").value = lesson.draft.model ?? nameFrom(lesson.draft.name);
  showKept();
  showExport();
  findQuestion();
}

/** Finds a held-out question for the commands that use the adapter. */
async function findQuestion() {
  const { id } = lesson.draft;
  await teachSafely(async () => {
    const { questions, head } = await studio(draftPath("/held_out"));
    if (lesson.draft?.id !== id) return; // other rows were opened meanwhile
    Object.assign(lesson, { question: questions[0]?.messages ?? null, head });
    showKept();
  });
}

function showKept() {
  const { model } = lesson.draft;
  byId("kept").hidden = !model;
  if (!model) return byId("keep-said").replaceChildren();
  const base = training.job?.base;
  const isServed = !base || base.served;
  byId("keep-code").hidden = !isServed;
  byId("export").hidden = lesson.head; // other programs have no score heads
  byId("keep-ask").hidden = !isServed || lesson.head; // the tab Ask shows answers, not labels
  showWhereItIs(base, isServed);
  const question = lesson.question ?? [{ role: "user", content: "…" }];
  if (lesson.head) {
    const body = { model, input: question.at(-1).content };
    byId("keep-curl").textContent = curlOf(body, "/v1/classify");
    byId("keep-python").textContent = pythonRequestOf(body, "/v1/classify");
    return;
  }
  const { temperature } = JUDGE_SETTINGS; // as the answers that were judged
  const body = bodyOf({ name: model, weight: 1 }, question, { temperature, max_tokens: 96 });
  byId("keep-curl").textContent = curlOf(body);
  byId("keep-python").textContent = pythonOf(body);
}

/** Says where the kept adapter is, and what serves it if this server does not. */
function showWhereItIs(base, isServed) {
  const place = byId("keep-said");
  const { reference, model } = lesson.draft;
  const version = Number(reference?.split("@").at(-1) ?? 1);
  const taken = version > 1 ? ` as version ${version} of a name that was taken` : "";
  const where = `${reference ?? model} is in the library${taken}`;
  if (isServed) return (place.textContent = `${where}, and a model of this server.`);
  const reason =
    `${where}. It was trained on ${base.name}, and this server answers with ${served.base}. ` +
    "To serve the adapter, start ";
  place.replaceChildren(reason, make("code", {}, base.command));
}

/** Keeps the adapter under a name; null if the name is taken and should stay as it is. */
async function keepAs(name) {
  const send = (body) => studio(draftPath("/keep"), { body });
  try {
    return await send({ name });
  } catch (fault) {
    if (fault.status !== NAME_TAKEN) throw fault;
    return confirm(fault.message) ? send({ name, next_version: true }) : null;
  }
}

async function keep(event) {
  event.preventDefault();
  const name = byId("keep-name").value.trim();
  await teachSafely(async () => {
    const draft = await keepAs(name);
    if (draft === null) return;
    Object.assign(lesson.draft, draft);
    judging.model = draft.reference;
    await Promise.all([loadModels(), listDrafts()]);
  });
  showKept();
}

/** Downloads a file of the draft's result. rest: the end of its address */
async function download(rest) {
  await teachSafely(async () => {
    const response = await request(`/studio/api${draftPath(rest)}`);
    const name = response.headers.get("content-disposition").split("''")[1];
    saveBlob(decodeURIComponent(name), await response.blob());
  });
}

/** Opens the tab Ask with the kept adapter in a column. */
function askKept() {
  const { model } = lesson.draft;
  if (!chosen.some((column) => column.name === model)) {
    if (chosen.length === MOST_ADAPTERS) chosen.pop();
    addColumn(model);
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
