// The Runs tab: the runs of a folder, with curves that grow while they are shown.

const EVERY = 2000; // milliseconds between two updates
const CHART = { height: 240, left: 52, bottom: 22 };
const MOST_POINTS = 700;
const NONE = "There are no runs. Start the server with --runs DIR to show the runs of a folder.";
const watched = { name: null, next: 0, steps: [], evaluations: [], timer: null };

async function openRuns() {
  const list = byId("runs-list");
  await told(list, async () => {
    const { data } = await read("/v1/runs");
    const item = (run) => {
      const current = String(run.name === watched.name);
      const open = make("button", { ariaCurrent: current, onclick: () => watch(run.name) }, run.name);
      open.append(make("small", {}, `${run.error ?? stateOf(run)}`));
      return make("li", {}, open);
    };
    list.replaceChildren();
    if (data.length) showList(list, data, item);
    else list.append(make("li", { className: "soft" }, NONE));
    if (watched.name === null && data.length) watch(data[0].name);
    else if (watched.name !== null) look(watched.name);
  });
}

function stateOf(run) {
  const steps = run.steps ? `step ${count(run.step)} of ${count(run.steps)}` : `step ${count(run.step)}`;
  const loss = run.loss === null ? "" : ` · loss ${figure(run.loss)}`;
  return `${steps}${loss} · ${run.reason ?? `written ${ago(run.idle_seconds)}`}`;
}

function watch(name) {
  Object.assign(watched, { name, next: 0, steps: [], evaluations: [] });
  for (const each of byId("runs-list").querySelectorAll("button"))
    each.ariaCurrent = String(each.firstChild.textContent === name);
  byId("run").replaceChildren();
  look(name);
}

/** Reads new records of the run, and again after a while if it goes on. */
async function look(name) {
  clearTimeout(watched.timer);
  let run = null;
  const went = await told(byId("run"), async () => {
    do {
      run = await read(`/v1/runs/${encodeURIComponent(name)}?after=${watched.next}`);
      if (watched.name !== name) return;
      if (run.start !== watched.next) Object.assign(watched, { steps: [], evaluations: [] }); // it was written anew
      watched.steps.push(...run.records.filter((record) => record.kind === "step"));
      watched.evaluations.push(...run.records.filter((record) => record.kind === "evaluation"));
      watched.next = run.next;
    } while (run.more);
    showRun(run);
  });
  if (watched.name === name && went && run.reason === null && !byId("runs").hidden)
    watched.timer = setTimeout(() => look(name), EVERY);
}

function showRun(run) {
  const { steps, evaluations } = watched;
  const last = steps.at(-1);
  const facts = [run.method && run.base ? `${run.method} on ${run.base}` : null, stateOf(run)];
  if (last?.seconds) facts.push(`${Math.round(last.tokens / last.seconds)} tokens/s`);
  const losses = steps.map((record) => [record.step, record.loss]);
  const held = evaluations.map((record) => [record.step, record.loss]);
  const rates = steps.map((record) => [record.step, record.learning_rate]);
  byId("run").replaceChildren(
    make("h2", {}, run.name),
    make("p", { className: "soft" }, facts.filter(Boolean).join(" · ")),
    chart("Loss", [
      ["training", "quiet", losses],
      ["training, smoothed", "a", smoothed(losses)],
      ["held-out", "b", held],
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

const marked = (value) => (value && Math.abs(value) < 0.001 ? value.toExponential(0) : figure(value.toPrecision(2)));

function thinned(points) {
  const there = points.filter(([, value]) => value !== null);
  const every = Math.ceil(there.length / MOST_POINTS);
  return there.filter((_, n) => n % every === 0 || n === there.length - 1);
}

/** series: name, class, [step, value] of each; held-out points get dots. room: width that is there. */
function chart(title, series, room = byId("run").clientWidth) {
  const thin = series.map(([name, look, points]) => [name, look, thinned(points)]);
  const drawn = thin.filter(([, , points]) => points.length);
  if (!drawn.length) return make("p", { className: "soft" }, `${title}: nothing is written yet`);
  const all = drawn.flatMap(([, , points]) => points);
  const [xs, ys] = [all.map(([x]) => x), all.map(([, y]) => y)];
  const least = (values) => values.reduce((a, b) => Math.min(a, b));
  const most = (values) => values.reduce((a, b) => Math.max(a, b));
  const [x0, x1, y1] = [least(xs), Math.max(most(xs), least(xs) + 1), most(ys)];
  const below = least(ys) - (y1 - least(ys)) * 0.05;
  const y0 = least(ys) >= 0 ? Math.max(0, below) : below;
  const { height, left, bottom } = CHART;
  const width = Math.min(720, room || 720); // of the screen's own points: text keeps its size
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left);
  const y = (value) => (height - bottom) * (1 - (value - y0) / (y1 - y0 || 1)) + 6;
  const marks = [...new Set([0, 0.5, 1].map((share) => y0 + share * (y1 - y0)))];
  const parts = marks.flatMap((value) => [
    draw("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }),
    draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, marked(value)),
  ]);
  parts.push(draw("text", { x: left, y: height + 6 }, `step ${count(x0)}`));
  parts.push(draw("text", { x: width, y: height + 6, "text-anchor": "end" }, count(x1)));
  for (const [, look, points] of drawn) {
    const line = points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    parts.push(draw("polyline", { class: `line ${look}`, points: line }));
    if (look !== "b") continue;
    for (const [at, value] of points) parts.push(draw("circle", { class: "dot", cx: x(at), cy: y(value), r: 3 }));
  }
  const names = drawn.map(([name, look]) => make("span", { className: `sign ${look}` }, name));
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height + 10}`, role: "img", "aria-label": title }, ...parts);
  return make("figure", {}, make("h3", {}, title), make("figcaption", {}, ...names), picture);
}
