// The Teach tab: the steps from rows to a served adapter, and the set of rows that is open.

/** Key under which the browser keeps the id of the set of rows that was open. */
const OPEN_DRAFT = "veneer-draft";
const OPEN_STEP = `${OPEN_DRAFT}-step`;
/**
 * draft: the open set of rows as the server describes it, or null.
 * preview: its columns and first rows. report: the result of its check.
 * rowsFault: why the chosen base cannot read the rows; another may. plan: the last plan of its run.
 * planFault: why its run cannot start. question: a held-out one.
 * head: whether the adapter gives labels.
 * settings: descriptions of a run's settings by path. bases: the other bases on this machine.
 * step: the one that is shown.
 */
const lesson = {
  draft: null,
  preview: null,
  report: null,
  rowsFault: null,
  plan: null,
  planFault: "",
  question: null,
  head: false,
  settings: {},
  bases: [],
  step: "rows",
};
/** By step: called when it is shown, or left. */
const whenStepShown = {};
const whenStepLeft = {};
/** By step: whether it can be opened. */
const stepIsOpen = {
  rows: () => true,
  method: () => rowsAreReady() || lesson.rowsFault !== null,
  train: () => startFault() === "" || Boolean(lesson.draft?.job),
  judge: () => Boolean(lesson.draft?.job) && lesson.draft.state === "done",
  keep: () => stepIsOpen.judge(),
};

const rowsAreReady = () => lesson.report !== null && !lesson.report.refused;
/** Why no training can start; empty if it can. */
function startFault() {
  if (lesson.rowsFault !== null) return `${lesson.rowsFault} Choose another base, or other rows.`;
  return rowsAreReady() ? lesson.planFault : "The rows are not checked yet.";
}

const studio = (path, settings) => read(`/studio/api${path}`, settings);
const draftPath = (rest = "") => `/drafts/${lesson.draft.id}${rest}`;

/** Makes a cell for each figure, with its label below. */
const figureCells = (figures) =>
  figures.map(([value, label]) =>
    make("div", {}, make("b", {}, value), make("small", {}, label)),
  );

/** Makes a cell with a text below the name of its part, such as a role. */
const messageCell = (name, text, look = "") =>
  make("div", { className: `message ${look}` }, make("small", {}, name), make("div", {}, text));

const stepButtons = () => [...byId("steps").querySelectorAll("button")];

function showSteps() {
  for (const button of stepButtons()) {
    const { step } = button.dataset;
    button.disabled = !stepIsOpen[step]();
    button.ariaCurrent = step === lesson.step ? "step" : null;
    byId(`step-${step}`).hidden = step !== lesson.step;
  }
  byId("rows-next").disabled = !stepIsOpen.method();
  byId("method-next").disabled = !stepIsOpen.train();
  byId("method-reason").textContent = lesson.draft === null ? "" : startFault();
  byId("train-start").disabled = startFault() !== "";
}

/**
 * Changes the page. If the focused element is gone afterwards, focuses the first visible one of
 * some selectors, so that a keyboard goes on from there.
 */
function keepFocus(selectors, change) {
  const focused = document.activeElement;
  change();
  if (focused === document.body || focused.checkVisibility()) return;
  const elements = selectors.map((selector) => document.querySelector(selector));
  elements.find((element) => element?.checkVisibility() && !element.disabled)?.focus();
}

function openStep(step) {
  whenStepLeft[lesson.step]?.();
  lesson.step = stepIsOpen[step]?.() ? step : "rows";
  if (lesson.draft) localStorage.setItem(OPEN_STEP, lesson.step);
  keepFocus([`#go-${lesson.step}`], () => {
    showSteps();
    whenStepShown[lesson.step]?.();
  });
}

/** Shows an error at the top of the tab. message: null hides it. */
function showFault(message) {
  byId("teach-fault").textContent = message ?? "";
  byId("teach-fault").hidden = message === null;
}

/** Does some work, and shows its error at the top of the tab. Returns whether it succeeded. */
async function teachSafely(work) {
  showFault(null);
  try {
    await work();
    return true;
  } catch (fault) {
    showFault(faultText(fault));
    return false;
  }
}

async function openDraft(id, step = "rows") {
  await teachSafely(async () => {
    const { preview, ...draft } = await studio(`/drafts/${encodeURIComponent(id)}`);
    Object.assign(lesson, { draft, preview, report: null, rowsFault: null });
    Object.assign(lesson, { plan: null, planFault: "", question: null });
    if (!draft.training) draft.job = null; // it was deleted
    forgetTraining();
    training.job = draft.training;
    localStorage.setItem(OPEN_DRAFT, id);
    byId("drafts").value = id;
    if (step === "rows" || !columnsAreChosen()) return;
    const check = checkRows();
    if (step === "method" || step === "train") await check; // later steps do not wait for it
  });
  showDraftButtons();
  openStep(step);
}

function closeDraft() {
  Object.assign(lesson, { draft: null, preview: null, report: null, rowsFault: null, plan: null });
  localStorage.removeItem(OPEN_DRAFT);
  byId("drafts").value = "";
  showDraftButtons();
  openStep("rows");
}

function showDraftButtons() {
  byId("draft-new").hidden = byId("draft-remove").hidden = lesson.draft === null;
}

/** Lists the sets of rows; a first, empty entry stands for a new one. */
async function listDrafts() {
  const { data } = await studio("/drafts");
  const entries = data.map((draft) => {
    const seconds = Date.now() / 1000 - draft.created;
    const age = seconds < 60 ? "just now" : ago(seconds);
    const state = draft.state === "paused" ? "stopped" : draft.state;
    const parts = [draft.name, draft.model ?? state, age];
    return make("option", { value: draft.id }, parts.filter(Boolean).join(" · "));
  });
  const list = byId("drafts");
  list.hidden = !data.length;
  list.replaceChildren(make("option", { value: "" }, "new rows"), ...entries);
  list.value = lesson.draft?.id ?? "";
  return data;
}

async function removeDraft() {
  if (!confirm(`Remove the rows of ${lesson.draft.name} from this server?`)) return;
  await teachSafely(async () => {
    await studio(draftPath("/remove"), { body: {} });
    closeDraft();
    await listDrafts();
  });
}

/** Opens the tab where the user left it: the last set of rows, at its step. */
async function openTeach() {
  if (lesson.draft) return openStep(lesson.step);
  await teachSafely(async () => {
    const [{ settings }, bases] = await Promise.all([studio("/settings"), studio("/bases")]);
    Object.assign(lesson, { settings, bases: bases.data });
    const drafts = await listDrafts();
    const lastId = localStorage.getItem(OPEN_DRAFT);
    if (drafts.some((draft) => draft.id === lastId))
      await openDraft(lastId, localStorage.getItem(OPEN_STEP) ?? "rows");
  });
  openStep(lesson.step);
}

function beginSteps() {
  for (const button of stepButtons())
    button.addEventListener("click", () => openStep(button.dataset.step));
  byId("drafts").addEventListener("change", (event) => {
    if (event.target.value) openDraft(event.target.value);
    else closeDraft();
  });
  byId("draft-new").addEventListener("click", closeDraft);
  byId("draft-remove").addEventListener("click", removeDraft);
  whenOpened.teach = openTeach;
}
beginSteps();
