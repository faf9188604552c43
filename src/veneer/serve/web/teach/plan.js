// A plan as a picture: memory as a bar, time, and the advice with its reasons.

const PART_COLOURS = 8;
/** Parts of the memory that are smaller than this share of it are not named. */
const LEAST_NAMED = 1 / 500;
const FITS = { true: "yes", false: "no", null: "–" };

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const large = (value) =>
  value >= 1e6 ? `${(value / 1e6).toFixed(value < 1e7 ? 2 : 1)} M` : count(value);

/** Shows the parts of the memory that a run needs, on a bar that is the machine's memory. */
function memoryFigure(plan, memory) {
  const needed = plan.needed_memory_bytes;
  const whole = Math.max(memory, needed);
  const label = `${bytes(needed)} of ${bytes(memory)}`;
  const bar = make("div", { className: "memory", role: "img", ariaLabel: label });
  const legend = make("figcaption");
  const parts = Object.entries(plan.parts).sort(([, a], [, b]) => b - a);
  parts.forEach(([name, size], number) => {
    const colour = `part${number % PART_COLOURS}`;
    const text = `${name} ${bytes(size)}`;
    const piece = make("span", { className: colour, title: text });
    piece.style.width = `${(100 * size) / whole}%`;
    bar.append(piece);
    if (size > whole * LEAST_NAMED)
      legend.append(make("span", { className: `sign ${colour}` }, text));
  });
  const title = `Memory: ${bytes(needed)} of this machine's ${bytes(memory)}`;
  return make("figure", {}, make("h3", {}, title), bar, legend);
}

/** Says whether the run fits this machine; null if that is unknown. */
function verdictText(plan) {
  if (plan.fits === null) return null;
  if (plan.fits) {
    const largest = countOf(plan.largest_batch ?? plan.batch, "row");
    const rows = `${largest} of ${countOf(plan.length, "token")}`;
    return make("p", {}, `It fits, with up to ${rows} at once.`);
  }
  const change = plan.changes?.length
    ? `These changes make it fit: ${plan.changes.join(", ")}.`
    : "No change makes it fit.";
  const text = `It does not fit this machine's memory. ${change}`;
  return make("p", { className: "bad", role: "alert" }, text);
}

/** Shows the advice; null if it is a method that the page does not offer. */
function adviceSection(advice) {
  if (!(advice.method in METHODS)) return null;
  const rank = advice.settings.rank ? `, rank ${advice.settings.rank}` : "";
  const rate = advice.learning_rate ?? "from the base's weights (default)";
  const title = `Advice: ${advice.method}${rank}, learning rate ${rate}`;
  const take = make("button", { onclick: () => takeAdvice(advice) }, "Take it");
  const isHere = (reason) => !reason.includes("full fine-tuning"); // which the page does not offer
  const reasons = advice.reasons.filter(isHere).map((reason) => make("p", {}, reason));
  return make("section", { className: "advice" }, make("h3", {}, title), ...reasons, take);
}

/** Returns the parts that show a plan. */
function planParts({ plans: [plan], memory_bytes: memory, advice, notes }) {
  const facts = [
    [duration(plan.run_seconds), `for ${countOf(plan.steps ?? 0, "step")}`],
    [count(Math.round(plan.tokens_per_second)), "tokens a second"],
    [large(plan.trainable_parameters), `parameters trained, of ${large(plan.total_parameters)}`],
    [bytes(plan.file_bytes), "size of the adapter"],
  ];
  const noteTexts = notes.map((note) => make("p", { className: "soft" }, note));
  const title = make("summary", {}, "How these figures are estimated");
  const parts = [
    make("div", { className: "counts" }, ...figureCells(facts)),
    memoryFigure(plan, memory),
    verdictText(plan),
    advice && adviceSection(advice),
    make("details", { className: "folded" }, title, ...noteTexts),
  ];
  return parts.filter(Boolean);
}

/** Returns a table of the plans of all methods, and their errors; a method's name chooses it. */
function comparisonParts({ plans, faults }) {
  const titles = ["method", "trained", "file", "memory", "time", "fits"];
  const head = make("tr", {}, ...titles.map((title) => make("th", {}, title)));
  const table = make("table", { className: "plans" }, head, ...plans.map(planRow));
  const faultTexts = faults.map((fault) => make("p", { className: "soft" }, fault));
  return [make("div", { className: "scroll" }, table), ...faultTexts];
}

function planRow(plan) {
  const onclick = () => chooseMethod(plan.method);
  const isOffered = plan.method in METHODS;
  const cells = [
    isOffered ? make("button", { className: "quiet", onclick }, plan.method) : plan.method,
    large(plan.trainable_parameters),
    bytes(plan.file_bytes),
    bytes(plan.needed_memory_bytes),
    duration(plan.run_seconds),
    FITS[plan.fits],
  ];
  return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
}
