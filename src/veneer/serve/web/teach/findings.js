// The check of all rows: counts, findings with their rows, and the first examples token by token.

const FINDINGS_SHOWN = 10;

const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part / whole < 0.1 ? 1 : 0)}%` : "0%");

function countsOf(report) {
  const rows = report.examples > report.rows ? `${count(report.rows)} rows, ${count(report.examples)} examples` : null;
  return [
    [rows ?? `${count(report.rows)} rows`, "to train on"],
    [count(report.validation_rows), "held out"],
    [count(report.tokens), "tokens"],
    [share(report.trained_tokens, report.tokens), "of them trained"],
    [count(report.longest), `tokens in the longest row, ${count(report.length)} allowed`],
  ];
}

function findingShown(problem) {
  const rowCount = problem.count === 1 ? "row" : `${count(problem.count)} rows:`;
  const lines = problem.lines.length ? ` · ${rowCount} ${linesOf(problem)}` : "";
  const title = make("summary", {}, make("b", {}, problem.code), ` ${problem.message}`, make("small", {}, lines));
  const rows = problem.rows.map((row) => make("pre", {}, `${row.line}: ${row.text}`));
  const step = problem.next_step ? make("p", { className: "soft" }, problem.next_step) : null;
  return make("details", { className: problem.fatal ? "finding fatal" : "finding" }, title, step, ...rows);
}

const LINES_SHOWN = 12;
const linesOf = (problem) =>
  problem.lines.slice(0, LINES_SHOWN).join(", ") + (problem.count > LINES_SHOWN ? ", …" : "");

/** Shows a list in pages. */
const paged = (items, shown, most) => showPaged(make("div", { className: "findings" }), items, shown, most);

/** Shows an example's tokens, each on its own ground; trained ones are marked. */
function tokensShown(sample) {
  const tokens = sample.tokens.map(([text, trained], number) =>
    make("span", { className: `token ${trained ? "trained" : ""} ${number % 2 ? "odd" : ""}` }, visible(text)),
  );
  const more = sample.more ? [make("span", { className: "soft" }, ` … ${count(sample.more)} more tokens`)] : [];
  return make("div", { className: "tokens" }, ...tokens, ...more);
}

const visible = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");

function samplesShown(samples) {
  const place = make("div");
  const choose = (number) => {
    for (const [at, button] of [...buttons.children].entries()) button.ariaPressed = String(at === number);
    place.replaceChildren(tokensShown(samples[number]));
  };
  const labels = samples.map((sample) => `row ${sample.line}${sample.kind === "answer" ? "" : `, ${sample.kind}`}`);
  const buttons = make("div", { className: "choices", role: "group", ariaLabel: "Example" });
  labels.forEach((label, number) => buttons.append(make("button", { onclick: () => choose(number) }, label)));
  choose(0);
  const mark = make("span", { className: "token trained" }, "marked");
  const legend = make("p", { className: "soft" }, mark, " tokens are trained; the others are read only.");
  return make("section", {}, make("h3", {}, "As the model sees it"), buttons, legend, place);
}

/** Checks all rows of the open draft as `veneer data check` does, and shows the result. */
async function checkRows() {
  const place = byId("rows-check");
  const { id } = lesson.draft;
  place.replaceChildren(make("p", { className: "soft" }, "Checking the rows …"));
  let report = null;
  const checked = await told(place, async () => (report = await studio(draftPath("/check"))));
  if (lesson.draft?.id !== id) return; // another draft was opened meanwhile
  lesson.report = report;
  if (checked) showReport(report);
  showSteps();
}

function showReport(report) {
  const parts = [make("div", { className: "counts" }, ...figureCells(countsOf(report)))];
  if (report.refused) {
    const advice = "A run would refuse these rows. Mend what is marked, and drop the file again.";
    parts.push(make("p", { className: "bad", role: "alert" }, advice));
  }
  if (report.problems.length) {
    const title = `Findings: ${count(report.problems.length)}`;
    parts.push(make("h3", {}, title), paged(report.problems, findingShown, FINDINGS_SHOWN));
  }
  if (report.samples.length) parts.push(samplesShown(report.samples));
  byId("rows-check").replaceChildren(...parts);
}
