// Step 4: held-out rows, answered by the base and by the adapter side by side.

const ASKED_AT_ONCE = 5;
const JUDGE_SETTINGS = { temperature: 0, max_tokens: 96, seed: 1 };
/** questions: held-out rows. asked: how many were asked. right: correct answers by model. */
const judging = { draft: null, job: null, model: null, questions: [], asked: 0, rightBase: 0, right: 0, worse: 0, ends: null };

async function showJudge() {
  byId("judge-figures").replaceChildren(...figuresOfRun());
  if (judging.draft === lesson.draft.id && judging.job === lesson.draft.job) return showJudged();
  judging.ends?.abort(); // answers for other rows would be counted here
  Object.assign(judging, { draft: lesson.draft.id, job: lesson.draft.job, ends: null, asked: 0, rightBase: 0, right: 0, worse: 0 });
  byId("judge-rows").replaceChildren();
  byId("judge-said").textContent = "Loading the adapter …";
  const { id } = lesson.draft;
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

const valueOf = ({ value, low, high }) => (low === null ? figure(value) : `${figure(value)} (${figure(low)} to ${figure(high)})`);

/** Shows the held-out loss before and after, each with its 95% interval. */
function figuresOfRun() {
  const held = training.job?.summary?.held_out;
  if (!held) return [make("p", { className: "soft" }, "The run has no held-out rows.")];
  const rows = [["base", held.before], ["this adapter", held.loss], ["change", held.change]].filter(([, found]) => found);
  const facts = rows.flatMap(([name, found]) => [make("dt", {}, name), make("dd", {}, valueOf(found))]);
  const title = `Loss on ${count(held.rows)} held-out rows, with 95% intervals`;
  return [make("h3", {}, title), make("dl", {}, ...facts)];
}

function showJudged() {
  const { asked, questions, right, rightBase, worse } = judging;
  const left = questions.length - asked;
  byId("judge-more").hidden = left <= 0 || judging.ends !== null;
  byId("judge-more").textContent = `Ask the next ${Math.min(left, ASKED_AT_ONCE)}`;
  byId("judge-stop").hidden = judging.ends === null;
  if (!questions.length) byId("judge-said").textContent = "There are no held-out questions to ask.";
  else
    byId("judge-said").textContent =
      `Of ${count(asked)} answers, equal to the expected one: ${count(rightBase)} by the base, ${count(right)} by this adapter.` +
      (worse ? ` The base was right and the adapter is not: ${count(worse)}.` : "");
}

const sameText = (text, expected) => text.trim() === expected.trim();

async function askRow(question, signal) {
  const place = (name) => make("div", { className: "message" }, make("small", {}, name), make("div", { className: "said waits" }));
  const [base, adapter] = [place(served.base), place("this adapter")];
  const line = make("small", { className: "soft" }, `row ${question.line}`);
  const text = make("div", { className: "message" }, make("small", {}, "question"), make("div", {}, question.messages.at(-1)?.content ?? ""));
  const expected = make("div", { className: "message" }, make("small", {}, "expected"), make("div", {}, question.expected));
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
