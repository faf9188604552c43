// Figures of all held-out rows: loss, metrics and forgetting with intervals; rows that got worse.

const FIGURE_NAMES = { loss: "loss", general: "loss on general text" };
const FIGURES_NOTE =
  "Losses are in nats a token: lower is better. A higher loss on general text means that the " +
  "adapter forgets. Intervals: 95%.";
const WORSE_SHOWN = 10;
/** state: of the evaluation on the page. ends: stops following it. */
const measuring = { state: {}, ends: null };

const otherAdapter = () => byId("judge-other").value;

/** Lists the adapters that can be compared with this one. */
function showOtherAdapters() {
  const names = served.adapters
    .map((card) => card.id)
    .filter((name) => name !== judging.model && !name.startsWith("trial-"));
  const chosenName = otherAdapter();
  const options = names.map((name) => make("option", { value: name }, name));
  byId("judge-other").replaceChildren(make("option", { value: "" }, "none"), ...options);
  if (names.includes(chosenName)) byId("judge-other").value = chosenName;
}

/**
 * Shows the evaluation, and follows it.
 * starts: starts it again; an evaluation that was never started begins by itself.
 */
async function showEvaluation({ starts = false } = {}) {
  measuring.ends?.abort();
  const { signal } = (measuring.ends = new AbortController());
  const other = otherAdapter();
  const path = draftPath("/evaluation");
  const query = `?other=${encodeURIComponent(other)}`;
  measuring.state = {};
  await teachSafely(async () => {
    updateEvaluation(await studio(path + query, { signal }));
    const { state, whole } = measuring.state;
    if (!whole && (starts || state === "idle"))
      updateEvaluation(await studio(path, { body: { other }, signal }));
    const events = `${path}/events${query}`;
    if (measuring.state.open) await followEvents(() => events, updateEvaluation, signal);
  });
}

/** Shows what changed in the evaluation's state. Returns whether it goes on. */
function updateEvaluation(changes) {
  const state = Object.assign(measuring.state, changes);
  keepFocus(["#judge-measure-stop", "#judge-measure", "#judge-next"], () => {
    byId("judge-measure").hidden = state.open || state.whole;
    byId("judge-measure-stop").hidden = !state.open;
  });
  byId("judge-measured").textContent = workStatus(state, "Measuring the held-out rows");
  if ("comparison" in changes) showComparison(changes.comparison);
  return state.open;
}

function showComparison(comparison) {
  const isMeasured = comparison?.models.length;
  byId("judge-figures").replaceChildren(
    ...(isMeasured ? [figuresTable(comparison)] : figuresOfRun()),
  );
  showWorse(comparison?.worse ?? null);
}

/** Writes a figure of a metric: shares as percent, small numbers with three decimal places. */
function inUnit(value, unit) {
  if (unit === "share") return `${(100 * value).toFixed(1)}%`;
  return Math.abs(value) < 100 ? value.toFixed(3) : figure(value);
}

function intervalText(interval, unit) {
  return interval ? ` (${inUnit(interval[0], unit)} to ${inUnit(interval[1], unit)})` : "";
}

function figureCell({ value, interval, unit, change, change_interval: changeInterval }) {
  if (value === null) return make("td", {}, "–");
  const shownValue = make("b", {}, inUnit(value, unit));
  const cell = make("td", {}, shownValue, intervalText(interval, unit));
  if (change !== null) {
    const sign = change > 0 ? "+" : "";
    const difference = `${sign}${inUnit(change, unit)}${intervalText(changeInterval, unit)}`;
    cell.append(make("small", { className: "soft" }, `${difference} against the base`));
  }
  return cell;
}

/** Makes a table of figures; a column for each model. */
function figuresTable({ rows, models }) {
  const titles = [countOf(rows, "held-out row"), ...models.map(({ name }) => name)];
  const head = make("tr", {}, ...titles.map((title) => make("th", {}, title)));
  const lines = Object.keys(models[0].figures).map((name) => {
    const title = make("td", {}, FIGURE_NAMES[name] ?? name.replaceAll("_", " "));
    return make("tr", {}, title, ...models.map(({ figures }) => figureCell(figures[name])));
  });
  const table = make("table", { className: "measured" }, head, ...lines);
  const note = make("p", { className: "soft" }, FIGURES_NOTE);
  return make("div", { className: "scroll" }, table, note);
}

function showWorse(worse) {
  const place = byId("judge-worse");
  if (worse === null) return place.replaceChildren();
  if (!worse.count) {
    const text = "No held-out row has a higher loss than with the base.";
    return place.replaceChildren(make("p", {}, text));
  }
  const rows = worse.count === 1 ? "1 row" : `${count(worse.count)} rows, the worst first`;
  const title = make("h3", {}, `Where it got worse: ${rows}`);
  place.replaceChildren(title, pagedList(worse.rows, worseRow, WORSE_SHOWN));
}

const MOST_TITLE = 80;
const beginning = (text) => (text.length > MOST_TITLE ? `${text.slice(0, MOST_TITLE)}…` : text);

/** Makes an entry of a row that got worse, which opens to its question and answers. */
function worseRow({ line, question, expected, losses, before, after }) {
  const [lossBefore, lossAfter] = losses.map(figure);
  const lossText = ` · loss ${lossBefore} with the base, ${lossAfter} with this adapter`;
  const title = `row ${line}: ${beginning(question)}`;
  const answers = [["base", before], ["this adapter", after]]
    .filter(([, side]) => side.answer !== null)
    .map(([name, side]) => messageCell(name, side.answer));
  const cells = [messageCell("question", question), messageCell("expected", expected), ...answers];
  return make(
    "details",
    { className: "finding" },
    make("summary", {}, title, make("small", {}, lossText)),
    make("div", { className: "cards" }, ...cells),
  );
}

async function stopEvaluation() {
  await teachSafely(() => studio(draftPath("/stop_work"), { body: { kind: "judge" } }));
  await showEvaluation();
}

function beginMeasures() {
  byId("judge-measure").addEventListener("click", () => showEvaluation({ starts: true }));
  byId("judge-measure-stop").addEventListener("click", stopEvaluation);
  whenStepLeft.judge = () => measuring.ends?.abort();
}
beginMeasures();
