// Step 4: held-out rows, answered by the base and by the adapter side by side.

const ASKED_AT_ONCE = 5;
const JUDGE_SETTINGS = { temperature: 0, max_tokens: 96, seed: 1 };
/** asked: questions so far. rightBase, right: correct answers of the base and of the adapter. */
const NO_ANSWERS = { asked: 0, rightBase: 0, right: 0, worse: 0 };
/** questions: held-out rows. worse: of them, those that only the base answers correctly. */
const judging = { draft: null, job: null, model: null, questions: [], ends: null, ...NO_ANSWERS };

async function showJudge() {
  byId("judge-figures").replaceChildren(...figuresOfRun());
  if (judging.draft === lesson.draft.id && judging.job === lesson.draft.job) return showJudged();
  judging.ends?.abort(); // answers for other rows would be counted here
  const { id, job } = lesson.draft;
  Object.assign(judging, { draft: id, job, ends: null, ...NO_ANSWERS });
  byId("judge-rows").replaceChildren();
  byId("judge-said").textContent = "Loading the adapter …";
  await teachSafely(async () => {
    const { model } = await studio(draftPath("/try"), { body: {} });
    const { questions } = await studio(draftPath("/held_out"));
    if (judging.draft !== id) return; // other rows were opened meanwhile
    Object.assign(judging, { model, questions });
    await loadModels();
    await askNext();
  });
  showJudged();
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
  const { asked, questions, right, rightBase, worse } = judging;
  const left = questions.length - asked;
  byId("judge-more").hidden = left <= 0 || judging.ends !== null;
  byId("judge-more").textContent = `Ask the next ${Math.min(left, ASKED_AT_ONCE)}`;
  byId("judge-stop").hidden = judging.ends === null;
  const counts = `${count(rightBase)} by the base, ${count(right)} by this adapter.`;
  const lost = worse ? ` The base was right and the adapter is not: ${count(worse)}.` : "";
  byId("judge-said").textContent = questions.length
    ? `Of ${count(asked)} answers, equal to the expected one: ${counts}${lost}`
    : "There are no held-out questions to ask.";
}

const sameText = (text, expected) => text.trim() === expected.trim();

async function askRow(question, signal) {
  const [base, adapter] = [messageCell(served.base, ""), messageCell("this adapter", "")];
  for (const cell of [base, adapter]) cell.lastChild.className = "said waits";
  const line = make("small", { className: "soft" }, `row ${question.line}`);
  const text = messageCell("question", question.messages.at(-1)?.content ?? "");
  const expected = messageCell("expected", question.expected);
  const row = make("article", { className: "card judged" }, line, text, expected, base, adapter);
  byId("judge-rows").append(row);
  const answer = async (name, shown) => {
    const body = bodyOf({ name, weight: 1 }, question.messages, JUDGE_SETTINGS);
    const result = await answered(body, (now) => (shown.lastChild.textContent = now.text), signal);
    shown.lastChild.classList.remove("waits");
    const right = sameText(result.text, question.expected);
    shown.classList.add(right ? "right" : "wrong");
    return right;
  };
  const [rightBase, right] = await Promise.all([answer(served.base, base), answer(judging.model, adapter)]);
  judging.asked++;
  judging.rightBase += Number(rightBase);
  judging.right += Number(right);
  if (rightBase && !right) {
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
  byId("judge-next").addEventListener("click", () => openStep("keep"));
  whenStepShown.judge = showJudge;
}
beginJudge();
