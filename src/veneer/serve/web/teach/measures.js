// Figures of all held-out rows: loss, metrics and forgetting with intervals; rows that got worse.

const FIGURE_NAMES = { loss: "loss", general: "loss on general text" };
const WORSE_SHOWN = 10;
/** ends: stops looking at the evaluation. */
const measuring = { ends: null };

const otherJudged = () => byId("judge-other").value;

/** Lists the adapters that may stand beside the judged one. */
function showOthers() {
  const names = served.adapters.map((card) => card.id).filter((name) => name !== judging.model && !name.startsWith("trial-"));
  const before = otherJudged();
  const options = names.map((name) => make("option", { value: name }, name));
  byId("judge-other").replaceChildren(make("option", { value: "" }, "none"), ...options);
  if (names.includes(before)) byId("judge-other").value = before;
}

/**
 * Shows the evaluation, and follows it while it runs.
 * starts: states in which an incomplete evaluation is started.
 */
async function measure(starts) {
  measuring.ends?.abort();
  const { signal } = (measuring.ends = new AbortController());
  const other = otherJudged();
  const path = draftPath("/evaluation");
  const address = `${path}?other=${encodeURIComponent(other)}`;
  await teachSafely(async () => {
    const state = await studio(address, { signal });
    showMeasured(state);
    if (starts.includes(state.state) && !state.whole) await studio(path, { body: { other }, signal });
    await followWork(address, showMeasured, signal);
  });
}

function showMeasured(state) {
  const works = WORKING.includes(state.state);
  byId("judge-measure").hidden = works || state.whole;
  byId("judge-measure-stop").hidden = !works;
  byId("judge-measured").textContent = workSaid(state, "Measuring the held-out rows");
  const { comparison } = state;
  byId("judge-figures").replaceChildren(...(comparison?.models.length ? [figuresTable(comparison)] : figuresOfRun()));
  showWorse(comparison?.worse ?? null);
}

/** Writes a figure of a metric: shares as percent, small numbers with three decimal places. */
function inUnit(value, unit) {
  if (unit === "share") return `${(100 * value).toFixed(1)}%`;
  return Math.abs(value) < 100 ? value.toFixed(3) : figure(value);
}

function intervalText(ends, unit) {
  return ends ? ` (${inUnit(ends[0], unit)} to ${inUnit(ends[1], unit)})` : "";
}

function figureCell({ value, interval, unit, change, change_interval: ends }) {
  if (value === null) return make("td", {}, "–");
  const sign = change > 0 ? "+" : "";
  const difference = change === null ? null : `${sign}${inUnit(change, unit)}${intervalText(ends, unit)} against the base`;
  const small = difference && make("small", { className: "soft" }, difference);
  return make("td", {}, make("b", {}, inUnit(value, unit)), intervalText(interval, unit), small);
}

/** Makes a table of figures; a column for each model. */
function figuresTable({ rows, models }) {
  const head = make("tr", {}, make("th", {}, `${count(rows)} held-out rows`), ...models.map(({ name }) => make("th", {}, name)));
  const names = Object.keys(models[0].figures);
  const lines = names.map((name) => {
    const title = FIGURE_NAMES[name] ?? name.replaceAll("_", " ");
    return make("tr", {}, make("td", {}, title), ...models.map(({ figures }) => figureCell(figures[name])));
  });
  const note = "Losses are in nats a token: lower is better. A higher loss on general text means that it forgets. Intervals: 95%.";
  const table = make("table", { className: "measured" }, head, ...lines);
  return make("div", { className: "scroll" }, table, make("p", { className: "soft" }, note));
}

function showWorse(worse) {
  const place = byId("judge-worse");
  if (worse === null) return place.replaceChildren();
  if (!worse.count) return place.replaceChildren(make("p", {}, "No held-out row has a higher loss than with the base."));
  const was = [...place.querySelectorAll("details[open]")].map((row) => row.dataset.line);
  const title = make("h3", {}, `Where it got worse: ${count(worse.count)} rows, the worst first`);
  place.replaceChildren(title, paged(worse.rows, worseShown, WORSE_SHOWN));
  for (const row of place.querySelectorAll("details")) row.open = was.includes(row.dataset.line);
}

const MOST_TITLE = 80;
const beginning = (text) => (text.length > MOST_TITLE ? `${text.slice(0, MOST_TITLE)}…` : text);

function worseShown(row) {
  const [before, after] = row.losses.map(figure);
  const figures = make("small", {}, ` · loss ${before} with the base, ${after} with this adapter`);
  const title = make("summary", {}, `row ${row.line}: ${beginning(row.question)}`, figures);
  const answers = [["base", row.before], ["this adapter", row.after]]
    .filter(([, side]) => side.answer !== null)
    .map(([name, side]) => messageCell(name, side.answer));
  const cells = [messageCell("question", row.question), messageCell("expected", row.expected), ...answers];
  const details = make("details", { className: "finding" }, title, make("div", { className: "cards" }, ...cells));
  details.dataset.line = row.line;
  return details;
}

async function stopMeasuring() {
  await teachSafely(() => studio(draftPath("/stop_work"), { body: { kind: "judge" } }));
  await measure([]);
}

function beginMeasures() {
  byId("judge-measure").addEventListener("click", () => measure(["idle", "failed"]));
  byId("judge-measure-stop").addEventListener("click", stopMeasuring);
  whenStepLeft.judge = () => measuring.ends?.abort();
}
beginMeasures();
