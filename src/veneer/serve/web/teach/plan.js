// A plan as a picture: memory as a bar, time, and the advice with its reasons.

const PART_COLOURS = 8;

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const large = (value) => (value >= 1e6 ? `${(value / 1e6).toFixed(value < 1e7 ? 2 : 1)} M` : count(value));

/** Shows the parts of the memory that a run needs, on a bar that stands for the machine's memory. */
function memoryBar(plan, memory) {
  const needed = plan.needed_memory_bytes;
  const whole = Math.max(memory, needed);
  const parts = Object.entries(plan.parts).sort(([, a], [, b]) => b - a);
  const bar = make("div", { className: "memory", role: "img", ariaLabel: `${bytes(needed)} of ${bytes(memory)}` });
  const legend = make("figcaption");
  parts.forEach(([name, size], number) => {
    const colour = `part${number % PART_COLOURS}`;
    const piece = make("span", { className: colour, title: `${name}: ${bytes(size)}` });
    piece.style.width = `${(100 * size) / whole}%`;
    bar.append(piece);
    if (size > whole / 500) legend.append(make("span", { className: `sign ${colour}` }, `${name} ${bytes(size)}`));
  });
  const title = `Memory: ${bytes(needed)} of this machine's ${bytes(memory)}`;
  return make("figure", {}, make("h3", {}, title), bar, legend);
}

function verdictOf(plan) {
  if (plan.fits === null) return null;
  if (plan.fits) {
    const rows = `${count(plan.largest_batch ?? plan.batch)} rows of ${count(plan.length)} tokens`;
    return make("p", {}, `It fits, with up to ${rows} at once.`);
  }
  const change = plan.changes?.length
    ? `These changes make it fit: ${plan.changes.join(", ")}.`
    : "No change makes it fit.";
  return make("p", { className: "bad", role: "alert" }, `It does not fit this machine's memory. ${change}`);
}

function adviceShown(advice) {
  const rank = advice.settings.rank ? `, rank ${advice.settings.rank}` : "";
  const title = `Advice: ${advice.method}${rank}, learning rate ${advice.learning_rate}`;
  const take = make("button", { onclick: () => takeAdvice(advice) }, "Take it");
  const reasons = advice.reasons.map((reason) => make("p", {}, reason));
  return make("section", { className: "advice" }, make("h3", {}, title), ...reasons, take);
}

function planShown(answer) {
  const [plan] = answer.plans;
  const facts = [
    [duration(plan.run_seconds), `for ${count(plan.steps ?? 0)} steps`],
    [count(Math.round(plan.tokens_per_second)), "tokens a second"],
    [large(plan.trainable_parameters), `values trained of ${large(plan.total_parameters)}`],
    [bytes(plan.file_bytes), "file of the result"],
  ];
  const texts = answer.notes.map((note) => make("p", { className: "soft" }, note));
  const notes = make("details", { className: "folded" }, make("summary", {}, "How this is known"), ...texts);
  const counts = make("div", { className: "counts" }, ...figureCells(facts));
  const parts = [counts, memoryBar(plan, answer.memory_bytes), verdictOf(plan)];
  if (answer.advice) parts.push(adviceShown(answer.advice));
  return [...parts, notes].filter((part) => part !== null);
}

const FITS = { true: "yes", false: "no", null: "–" };

/** Shows the plans of all methods as a table; a method's name chooses it. */
function comparedShown(answer) {
  const head = ["method", "trained", "file", "memory", "time", "fits"].map((name) => make("th", {}, name));
  const rows = answer.plans.map((plan) => {
    const offered = plan.method in METHODS;
    const choose = () => chooseMethod(plan.method);
    const button = make("button", { className: "quiet", onclick: choose }, plan.method);
    const cells = [
      offered ? button : plan.method,
      large(plan.trainable_parameters),
      bytes(plan.file_bytes),
      bytes(plan.needed_memory_bytes),
      duration(plan.run_seconds),
      FITS[plan.fits],
    ];
    return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
  });
  const faults = answer.faults.map((fault) => make("p", { className: "soft" }, fault));
  const table = make("table", { className: "plans" }, make("tr", {}, ...head), ...rows);
  return [make("div", { className: "scroll" }, table), ...faults];
}
