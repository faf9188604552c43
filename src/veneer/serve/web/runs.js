// The Runs tab: the runs of a folder, with curves that grow while they are shown.

const EVERY = 2000; // milliseconds between two updates
const CHART = { height: 240, left: 52, bottom: 22 };
const MOST_POINTS = 700;
const NONE = "There are no runs. Start the server with --runs DIR to show the runs of a folder.";
const watched = { name: null, next: 0, steps: [], evaluations: [], timer: null };

async function openRuns() {
  const list = byId("runs-list");
  await workSafely(list, async () => {
    const { data } = await read("/v1/runs");
    list.replaceChildren();
    if (data.length) showList(list, data, runEntry);
    else list.append(make("li", { className: "soft" }, NONE));
    if (watched.name === null && data.length) watchRun(data[0].name);
    else if (watched.name !== null) readRun(watched.name);
  });
}

function runEntry(run) {
  const ariaCurrent = String(run.name === watched.name);
  const open = make("button", { ariaCurrent, onclick: () => watchRun(run.name) }, run.name);
  open.append(make("small", {}, run.error ?? runStatus(run)));
  return make("li", {}, open);
}

function runStatus(run) {
  const all = run.steps ? ` of ${count(run.steps)}` : "";
  const loss = run.loss === null ? "" : ` · loss ${figure(run.loss)}`;
  const state = run.reason ?? `written ${ago(run.idle_seconds)}`;
  return `step ${count(run.step)}${all}${loss} · ${state}`;
}

function watchRun(name) {
  Object.assign(watched, { name, next: 0, steps: [], evaluations: [] });
  for (const button of byId("runs-list").querySelectorAll("button"))
    button.ariaCurrent = String(button.firstChild.textContent === name);
  byId("run").replaceChildren();
  readRun(name);
}

/** Reads new records of the run, and again after a while if it goes on. */
async function readRun(name) {
  clearTimeout(watched.timer);
  let run = null;
  const isRead = await workSafely(byId("run"), async () => {
    do {
      run = await read(`/v1/runs/${encodeURIComponent(name)}?after=${watched.next}`);
      if (watched.name !== name) return;
      addRecords(run);
    } while (run.more);
    showRun(run);
  });
  const goesOn = watched.name === name && isRead && run.reason === null;
  if (goesOn && !byId("runs").hidden) watched.timer = setTimeout(() => readRun(name), EVERY);
}

function addRecords({ records, start, next }) {
  if (start !== watched.next) Object.assign(watched, { steps: [], evaluations: [] }); // rewritten
  watched.steps.push(...records.filter((record) => record.kind === "step"));
  watched.evaluations.push(...records.filter((record) => record.kind === "evaluation"));
  watched.next = next;
}

function showRun(run) {
  const { steps, evaluations } = watched;
  const last = steps.at(-1);
  const facts = [run.method && run.base ? `${run.method} on ${run.base}` : null, runStatus(run)];
  if (last?.seconds) facts.push(`${Math.round(last.tokens / last.seconds)} tokens/s`);
  const losses = steps.map((record) => [record.step, record.loss]);
  const heldOut = evaluations.map((record) => [record.step, record.loss]);
  const rates = steps.map((record) => [record.step, record.learning_rate]);
  byId("run").replaceChildren(
    make("h2", {}, run.name),
    make("p", { className: "soft" }, facts.filter(Boolean).join(" · ")),
    chart("Loss", [
      ["training", "quiet", losses],
      ["training, smoothed", "a", smoothed(losses)],
      ["held-out", "b", heldOut],
    ]),
    chart("Learning rate", [["learning rate", "a", rates]]),
  );
}

/** Returns a running mean over a fiftieth of the points. */
function smoothed(points) {
  const keep = 1 - 1 / Math.max(1, points.length / 50);
  let mean = null;
  return points.map(([step, value]) => {
    if (value !== null) mean = mean === null ? value : keep * mean + (1 - keep) * value;
    return [step, mean];
  });
}

/** Writes a value of an axis with two digits. */
const axisText = (value) =>
  value && Math.abs(value) < 0.001 ? value.toExponential(0) : figure(value.toPrecision(2));

/** Returns at most MOST_POINTS points that have a value, with the last one. */
function thinned(points) {
  const measured = points.filter(([, value]) => value !== null);
  const every = Math.ceil(measured.length / MOST_POINTS);
  return measured.filter((_, n) => n % every === 0 || n === measured.length - 1);
}

/**
 * Draws curves. series: name, class and points [step, value] of each; held-out points get dots.
 * room: width of the place for it.
 */
function chart(title, series, room = byId("run").clientWidth) {
  const curves = series
    .map(([name, look, points]) => [name, look, thinned(points)])
    .filter(([, , points]) => points.length);
  if (!curves.length) return make("p", { className: "soft" }, `${title}: nothing is written yet`);
  const scale = scaleOf(curves.flatMap(([, , points]) => points), room);
  const parts = [...axisParts(scale), ...curves.flatMap((curve) => curveParts(curve, scale))];
  const viewBox = `0 0 ${scale.width} ${CHART.height + 10}`;
  const picture = draw("svg", { viewBox, role: "img", "aria-label": title }, ...parts);
  const names = curves.map(([name, look]) => make("span", { className: `sign ${look}` }, name));
  return make("figure", {}, make("h3", {}, title), make("figcaption", {}, ...names), picture);
}

/**
 * Returns how points become places of a chart: the functions x and y, the range of both, and the
 * width, in the screen's own points, so that text keeps its size.
 */
function scaleOf(points, room) {
  const least = (values) => values.reduce((a, b) => Math.min(a, b));
  const most = (values) => values.reduce((a, b) => Math.max(a, b));
  const [steps, values] = [points.map(([step]) => step), points.map(([, value]) => value)];
  const [x0, y1] = [least(steps), most(values)];
  const x1 = Math.max(most(steps), x0 + 1);
  const below = least(values) - (y1 - least(values)) * 0.05;
  const y0 = least(values) >= 0 ? Math.max(0, below) : below;
  const { height, left, bottom } = CHART;
  const width = Math.min(720, room || 720);
  const x = (step) => left + ((step - x0) / (x1 - x0)) * (width - left);
  const y = (value) => (height - bottom) * (1 - (value - y0) / (y1 - y0 || 1)) + 6;
  return { x, y, x0, x1, y0, y1, width };
}

/** Draws the lines behind the curves, and the ends of both axes. */
function axisParts({ y, x0, x1, y0, y1, width }) {
  const { height, left } = CHART;
  const text = (value, place) => draw("text", { "text-anchor": "end", ...place }, value);
  const values = new Set([0, 0.5, 1].map((share) => y0 + share * (y1 - y0)));
  const lines = [...values].flatMap((value) => [
    draw("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }),
    text(axisText(value), { x: left - 8, y: y(value) + 4 }),
  ]);
  const first = text(`step ${count(x0)}`, { x: left, y: height + 6, "text-anchor": "start" });
  return [...lines, first, text(count(x1), { x: width, y: height + 6 })];
}

function curveParts([, look, points], { x, y }) {
  const places = points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`);
  const line = draw("polyline", { class: `line ${look}`, points: places.join(" ") });
  if (look !== "b") return [line];
  const dots = points.map(([step, value]) => ({ cx: x(step), cy: y(value), r: 3 }));
  return [line, ...dots.map((place) => draw("circle", { class: "dot", ...place }))];
}
