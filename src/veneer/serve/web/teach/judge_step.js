// Step 4: held-out rows, answered by the base, by the adapter and by another one, side by side.

const ASKED_AT_ONCE = 5;
const JUDGE_SETTINGS = { temperature: 0, max_tokens: 96, seed: 1 };
/**
 * asked: questions so far. right: number of correct answers of each model, by column.
 * worse: questions that only the base answers correctly.
 */
const noAnswers = () => ({ asked: 0, right: [], worse: 0 });
/**
 * draft, job: whose adapter is judged. model: its name here.
 * head: it gives labels. ends: stops the answers.
 */
const judging = {
  draft: null,
  job: null,
  model: null,
  questions: [],
  head: false,
  ends: null,
  ...noAnswers(),
};

async function showJudge() {
  const base = training.job?.base;
  const isServed = !base || base.served;
  showWhereItAnswers(base, isServed);
  byId("judge-figures").replaceChildren(...figuresOfRun());
  const isNew = judging.draft !== lesson.draft.id || judging.job !== lesson.draft.job;
  if (isNew) forgetAnswers();
  showOtherAdapters();
  if (!isServed) byId("judge-other").value = ""; // adapters of the server's base do not fit
  showEvaluation();
  if (isServed && isNew) await loadQuestions();
  showJudged();
}

/** Says how to ask an adapter of another base, which this server cannot load. */
function showWhereItAnswers(base, isServed) {
  byId("judge-elsewhere").hidden = isServed;
  byId("judge-answers").hidden = byId("judge-fields").hidden = !isServed;
  if (isServed) return;
  const reason =
    `This adapter was trained on ${base.name}, and this server answers with ${served.base}, so ` +
    "it cannot be asked here. The figures are measured all the same. To ask it, start ";
  byId("judge-elsewhere").replaceChildren(reason, make("code", {}, base.command));
}

/** Loads the adapter and the held-out questions, and asks the first ones. */
async function loadQuestions() {
  const { id } = lesson.draft;
  byId("judge-said").textContent = "Loading the adapter …";
  await teachSafely(async () => {
    const { model } = await studio(draftPath("/try"), { body: {} });
    const { questions, head } = await studio(draftPath("/held_out"));
    if (judging.draft !== id) return; // other rows were opened meanwhile
    Object.assign(judging, { model, questions, head });
    await loadModels();
    showOtherAdapters();
    await askNext();
  });
}

/** Forgets the answers: other rows were opened, or another model is compared. */
function forgetAnswers() {
  judging.ends?.abort(); // answers for other rows would be counted here
  const { id, job } = lesson.draft;
  if (judging.draft !== id || judging.job !== job)
    Object.assign(judging, { model: null, questions: [] });
  Object.assign(judging, { draft: id, job, ends: null, ...noAnswers() });
  byId("judge-rows").replaceChildren();
}

/** Returns the models that answer: [name of the model, name of the column]. */
function judgedModels() {
  const models = [[judging.model, "this adapter"]];
  if (!judging.head) models.unshift([served.base, served.base]); // a base has no labels
  const other = otherAdapter();
  return other ? [...models, [other, other]] : models;
}

async function chooseOther() {
  forgetAnswers();
  showEvaluation();
  if (judging.model) await askNext();
}

function intervalOf({ value, low, high }) {
  return low === null ? figure(value) : `${figure(value)} (${figure(low)} to ${figure(high)})`;
}

/** Shows the held-out loss before and after the run, each with its 95% interval. */
function figuresOfRun() {
  const heldOut = training.job?.summary?.held_out;
  if (!heldOut) return [make("p", { className: "soft" }, "The run has no held-out rows.")];
  const losses = { base: heldOut.before, "this adapter": heldOut.loss, change: heldOut.change };
  const facts = Object.entries(losses)
    .filter(([, loss]) => loss)
    .flatMap(([name, loss]) => [make("dt", {}, name), make("dd", {}, intervalOf(loss))]);
  const title = `Loss on ${countOf(heldOut.rows, "held-out row")}, with 95% intervals`;
  return [make("h3", {}, title), make("dl", {}, ...facts)];
}

function showJudged() {
  const { asked, questions, right, worse } = judging;
  const left = questions.length - asked;
  byId("judge-more").textContent = `Ask the next ${Math.min(left, ASKED_AT_ONCE)}`;
  keepFocus(["#judge-stop", "#judge-more", "#judge-next"], () => {
    byId("judge-more").hidden = left <= 0 || judging.ends !== null;
    byId("judge-stop").hidden = judging.ends === null;
  });
  const countOf = ([, name], column) => `${count(right[column] ?? 0)} by ${name}`;
  const counts = judgedModels().map(countOf);
  const worseText = worse ? ` Only the base answers ${count(worse)} of them correctly.` : "";
  byId("judge-said").textContent = questions.length
    ? `Correct answers to ${count(asked)} questions: ${counts.join(", ")}.${worseText}`
    : "No held-out row is a question with a text as its answer: the figures above judge the rows.";
}

const isSameText = (text, expected) => text.trim() === expected.trim();

/** Asks every model a question, and shows the answers as they come. */
async function askRow(question, signal) {
  const models = judgedModels();
  const cells = models.map(([, name]) => messageCell(name, ""));
  const row = questionCard(question, cells);
  byId("judge-rows").append(row);
  const ask = ([name], column) => askModel(name, question, cells[column], signal);
  const right = await Promise.all(models.map(ask));
  if (signal.aborted) return; // other models are asked now
  judging.asked++;
  judging.right = right.map((isRight, column) => (judging.right[column] ?? 0) + Number(isRight));
  if (!judging.head && right[0] && !right[1]) {
    judging.worse++;
    row.classList.add("worse");
  }
  showJudged();
}

/** Makes the card of a question, with a cell for the answer of each model. */
function questionCard({ line, messages, expected }, cells) {
  for (const cell of cells) cell.lastChild.className = "said waits";
  const questionCell = messageCell(`question, row ${line}`, messages.at(-1)?.content ?? "");
  const expectedCell = messageCell("expected", expected);
  return make("article", { className: "card judged" }, questionCell, expectedCell, ...cells);
}

/** Asks a model, and shows its answer in a cell. Returns whether it is the expected one. */
async function askModel(name, question, cell, signal) {
  const place = cell.lastChild;
  const show = (answer) => (place.textContent = answer.text);
  const { text } = await (judging.head ? classifyText : streamAnswer)(
    bodyOf({ name, weight: 1 }, question.messages, JUDGE_SETTINGS),
    show,
    signal,
  );
  place.classList.remove("waits");
  const isRight = isSameText(text, question.expected);
  cell.classList.add(isRight ? "right" : "wrong");
  return isRight;
}

/** Asks a score head for the label of the last message's text. */
async function classifyText({ model, messages }, show, signal) {
  const body = { model, input: messages.at(-1).content };
  const { data } = await read("/v1/classify", { body, signal });
  const answer = { text: data[0].label };
  show(answer);
  return answer;
}

async function askNext() {
  const ends = (judging.ends = new AbortController());
  showJudged();
  const questions = judging.questions.slice(judging.asked, judging.asked + ASKED_AT_ONCE);
  const asks = () => Promise.all(questions.map((question) => askRow(question, ends.signal)));
  await teachSafely(asks);
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
