// Step 4: held-out rows, answered by the base, by the adapter and by another one, side by side.

const ASKED_AT_ONCE = 5;
const JUDGE_SETTINGS = { temperature: 0, max_tokens: 96, seed: 1 };
/** asked: questions so far. right: number of correct answers of each model, by column. */
const noAnswers = () => ({ asked: 0, right: [], worse: 0 });
/** questions: held-out rows. worse: of them, those that only the base answers correctly. */
const judging = { draft: null, job: null, model: null, questions: [], ends: null, ...noAnswers() };

async function showJudge() {
  const base = training.job?.base;
  const elsewhere = base ? !base.served : false;
  byId("judge-elsewhere").hidden = !elsewhere;
  byId("judge-answers").hidden = byId("judge-fields").hidden = elsewhere;
  if (elsewhere) {
    const reason =
      `This adapter was trained on ${base.name}, and this server answers with ${served.base}, so it cannot be asked here. ` +
      "The figures are measured all the same. To ask it, start ";
    byId("judge-elsewhere").replaceChildren(reason, make("code", {}, base.command));
  }
  byId("judge-figures").replaceChildren(...figuresOfRun());
  const isOpen = judging.draft === lesson.draft.id && judging.job === lesson.draft.job;
  if (!isOpen) forgetAnswers();
  showOthers();
  if (elsewhere) byId("judge-other").value = ""; // adapters of the server's base do not fit
  measure(["idle"]);
  if (elsewhere || isOpen) return showJudged();
  const { id } = lesson.draft;
  byId("judge-said").textContent = "Loading the adapter …";
  await teachSafely(async () => {
    const { model } = await studio(draftPath("/try"), { body: {} });
    const { questions } = await studio(draftPath("/held_out"));
    if (judging.draft !== id) return; // other rows were opened meanwhile
    Object.assign(judging, { model, questions });
    await loadModels();
    showOthers();
    await askNext();
  });
  showJudged();
}

/** Forgets the answers: other rows were opened, or another model stands beside. */
function forgetAnswers() {
  judging.ends?.abort(); // answers for other rows would be counted here
  const { id, job } = lesson.draft;
  if (judging.draft !== id || judging.job !== job) Object.assign(judging, { model: null, questions: [] });
  Object.assign(judging, { draft: id, job, ends: null, ...noAnswers() });
  byId("judge-rows").replaceChildren();
}

/** The models that answer: [name of the model, name of the column]. */
function judgedModels() {
  const other = otherJudged();
  return [[served.base, served.base], [judging.model, "this adapter"], ...(other ? [[other, other]] : [])];
}

async function chooseOther() {
  forgetAnswers();
  measure(["idle"]);
  if (judging.model) await askNext();
}

const valueOf = ({ value, low, high }) =>
  low === null ? figure(value) : `${figure(value)} (${figure(low)} to ${figure(high)})`;

/** Shows the held-out loss before and after, each with its 95% interval. */
function figuresOfRun() {
  const held = training.job?.summary?.held_out;
  if (!held) return [make("p", { className: "soft" }, "The run has no held-out rows.")];
  const losses = [["base", held.before], ["this adapter", held.loss], ["change", held.change]];
  const facts = losses
    .filter(([, loss]) => loss)
    .flatMap(([name, loss]) => [make("dt", {}, name), make("dd", {}, valueOf(loss))]);
  const title = `Loss on ${count(held.rows)} held-out rows, with 95% intervals`;
  return [make("h3", {}, title), make("dl", {}, ...facts)];
}

function showJudged() {
  const { asked, questions, right, worse } = judging;
  const left = questions.length - asked;
  byId("judge-more").hidden = left <= 0 || judging.ends !== null;
  byId("judge-more").textContent = `Ask the next ${Math.min(left, ASKED_AT_ONCE)}`;
  byId("judge-stop").hidden = judging.ends === null;
  const counts = judgedModels().map(([, name], column) => `${count(right[column] ?? 0)} by ${name}`);
  const lost = worse ? ` The base was right and the adapter is not: ${count(worse)}.` : "";
  byId("judge-said").textContent = questions.length
    ? `Of ${count(asked)} answers, equal to the expected one: ${counts.join(", ")}.${lost}`
    : "There are no held-out questions to ask.";
}

const sameText = (text, expected) => text.trim() === expected.trim();

/** Asks every model a question, and shows the answers as they come. */
async function askRow(question, signal) {
  const models = judgedModels();
  const cells = models.map(([, name]) => messageCell(name, ""));
  for (const cell of cells) cell.lastChild.className = "said waits";
  const text = messageCell(`question, row ${question.line}`, question.messages.at(-1)?.content ?? "");
  const expected = messageCell("expected", question.expected);
  const row = make("article", { className: "card judged" }, text, expected, ...cells);
  byId("judge-rows").append(row);
  const answer = async ([name], column) => {
    const shown = cells[column];
    const body = bodyOf({ name, weight: 1 }, question.messages, JUDGE_SETTINGS);
    const result = await answered(body, (now) => (shown.lastChild.textContent = now.text), signal);
    shown.lastChild.classList.remove("waits");
    const right = sameText(result.text, question.expected);
    shown.classList.add(right ? "right" : "wrong");
    return right;
  };
  const right = await Promise.all(models.map(answer));
  if (signal.aborted) return; // other models are asked now
  judging.asked++;
  judging.right = right.map((isRight, column) => (judging.right[column] ?? 0) + Number(isRight));
  if (right[0] && !right[1]) {
    judging.worse++;
    row.classList.add("worse");
  }
  showJudged();
}

async function askNext() {
  const ends = (judging.ends = new AbortController());
  showJudged();
  const next = judging.questions.slice(judging.asked, judging.asked + ASKED_AT_ONCE);
  await teachSafely(() => Promise.all(next.map((question) => askRow(question, ends.signal))));
  if (judging.ends !== ends) return; // other rows were opened meanwhile
  judging.ends = null;
  showJudged();
}

function beginJudge() {
  byId("judge-more").addEventListener("click", askNext);
  byId("judge-stop").addEventListener("click", () => judging.ends?.abort());
  byId("judge-other").addEventListener("change", chooseOther);
  byId("judge-next").addEventListener("click", () => openStep("keep"));
  whenStepShown.judge = showJudge;
}
beginJudge();
