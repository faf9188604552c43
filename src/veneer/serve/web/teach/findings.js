// The check of all rows: counts, findings with their rows, and the first examples token by token.

const FINDINGS_SHOWN = 10;
const LINES_SHOWN = 12;

/** Writes a part of a whole as percent; a small one with a decimal place. */
function percent(part, whole) {
  if (!whole) return "0%";
  return `${((100 * part) / whole).toFixed(part / whole < 0.1 ? 1 : 0)}%`;
}

function countsOf(report) {
  const isPairs = ["pairs", "openai_pairs"].includes(lesson.preview.layout);
  const examples =
    report.examples > report.rows && !isPairs ? `, ${countOf(report.examples, "example")}` : "";
  return [
    [`${countOf(report.rows, isPairs ? "pair" : "row")}${examples}`, "to train on"],
    [count(report.validation_rows), "held out"],
    [count(report.tokens), "tokens"],
    [percent(report.trained_tokens, report.tokens), "of them trained"],
    [count(report.longest), `tokens in the longest row, ${count(report.length)} allowed`],
  ];
}

/** Makes an entry of a finding, which opens to what to do and to some of its rows. */
function findingEntry(problem) {
  const title = make("summary", {}, make("b", {}, problem.code), ` ${problem.message}`);
  if (problem.lines.length) title.append(make("small", {}, ` · ${linesText(problem)}`));
  const step = problem.next_step
    ? make("p", { className: "soft" }, problem.next_step)
    : null;
  const rows = problem.rows.map((row) => make("pre", {}, `${row.line}: ${row.text}`));
  const className = problem.fatal ? "finding fatal" : "finding";
  return make("details", { className }, title, step, ...rows);
}

/** Names the rows of a finding: "row 3", or "14 rows: 3, 4, …". */
function linesText({ lines, count: rows }) {
  const names = lines.slice(0, LINES_SHOWN).join(", ") + (rows > LINES_SHOWN ? ", …" : "");
  return rows === 1 ? `row ${names}` : `${count(rows)} rows: ${names}`;
}

/** Makes a list of entries in pages. */
const pagedList = (items, entryOf, most) =>
  showPaged(make("div", { className: "findings" }), items, entryOf, most);

const visible = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");

/** Shows an example's tokens, each on its own ground; trained ones are marked. */
function tokenList(sample) {
  const tokens = sample.tokens.map(([text, isTrained], number) => {
    const classes = ["token", isTrained && "trained", number % 2 && "odd"].filter(Boolean);
    return make("span", { className: classes.join(" ") }, visible(text));
  });
  const list = make("div", { className: "tokens" }, ...tokens);
  if (sample.more)
    list.append(make("span", { className: "soft" }, ` … ${count(sample.more)} more tokens`));
  return list;
}

/** Shows one of the first examples, which a button chooses. */
function sampleSection(samples) {
  const place = make("div");
  const buttons = make("div", { className: "choices", role: "group", ariaLabel: "Example" });
  const choose = (sample, chosenButton) => {
    for (const button of buttons.children) button.ariaPressed = String(button === chosenButton);
    place.replaceChildren(tokenList(sample));
  };
  for (const sample of samples) {
    const kind = sample.kind === "answer" ? "" : `, ${sample.kind}`;
    const button = make("button", {}, `row ${sample.line}${kind}`);
    button.addEventListener("click", () => choose(sample, button));
    buttons.append(button);
  }
  choose(samples[0], buttons.firstChild);
  const mark = make("span", { className: "token trained" }, "marked");
  const legendText = " tokens are trained; the others are only read.";
  const legend = make("p", { className: "soft" }, mark, legendText);
  return make("section", {}, make("h3", {}, "As the model sees it"), buttons, legend, place);
}

/** Checks all rows of the open draft as `veneer data check` does, and shows the result. */
async function checkRows() {
  const place = byId("rows-check");
  const { id } = lesson.draft;
  place.replaceChildren(make("p", { className: "soft" }, "Checking the rows …"));
  let report = null;
  const isChecked = await workSafely(place, async () => {
    report = await studio(draftPath("/check"));
  });
  if (lesson.draft?.id !== id) return; // another draft was opened meanwhile
  lesson.report = report;
  lesson.rowsFault = rowsFaultOf(report, isChecked ? "" : place.textContent);
  if (isChecked) showReport(report);
  showSteps();
}

/** Says why the base cannot read the rows; null if it can, or if no base could. */
function rowsFaultOf(report, faultShown) {
  if (report === null) return faultShown;
  if (!report.of_base) return null;
  const { code, message } = report.problems.find((problem) => problem.fatal);
  return `${titleOf(lesson.draft.method.base ?? "")} cannot learn these rows: ${code} ${message}.`;
}

function showReport(report) {
  const parts = [make("div", { className: "counts" }, ...figureCells(countsOf(report)))];
  if (report.refused) {
    const advice = report.of_base
      ? "This base cannot learn these rows. Choose another one in step 2, or fix what is red."
      : "A run would refuse these rows. Fix what is red, and drop the file again.";
    parts.push(make("p", { className: "bad", role: "alert" }, advice));
  }
  const { problems, samples } = report;
  if (problems.length) {
    const title = make("h3", {}, `Findings: ${count(problems.length)}`);
    parts.push(title, pagedList(problems, findingEntry, FINDINGS_SHOWN));
  }
  if (samples.length) parts.push(sampleSection(samples));
  byId("rows-check").replaceChildren(...parts);
}
