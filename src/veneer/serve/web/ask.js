// The Ask tab: turns of a conversation. Each turn has a question and the answers of all columns.

/**
 * Turns of the conversation: question, settings, answers, left (answers that go on).
 * ends: stops them. An answer: column, body (its request), result (stream.js), error.
 */
const turns = [];

function settingsAsked() {
  const value = (id) => Number(byId(id).value);
  return {
    temperature: value("temperature"),
    top_p: value("top-p"),
    max_tokens: value("max-tokens"),
    seed: value("seed"),
  };
}

function showSettings() {
  const { temperature, top_p, max_tokens, seed } = settingsAsked();
  const parts = [`temperature ${temperature}`, `seed ${seed}`, `up to ${max_tokens} tokens`];
  if (top_p !== 1) parts.splice(1, 0, `top p ${top_p}`);
  if (byId("system").value.trim()) parts.push("system message");
  byId("settings-said").textContent = parts.join(" · ");
}

/**
 * Returns one column's conversation with a new question. Turns without an answer of this column
 * are left out.
 */
function messagesOf(number, question) {
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    const answer = turn.answers.find(({ column }) => column.number === number);
    const content = answer?.result?.text;
    if (content)
      messages.push({ role: "user", content: turn.question }, { role: "assistant", content });
  }
  return [...messages, { role: "user", content: question }];
}

function ask() {
  const question = byId("question").value.trim();
  if (!question || !served.base) return;
  byId("question").value = "";
  byId("empty").hidden = true;
  const settings = settingsAsked();
  const answers = columnsAsked().map((column) => {
    const messages = messagesOf(column.number, question);
    const body = bodyOf({ name: column.name, weight: column.weight }, messages, settings);
    return { column, body, result: null, error: null };
  });
  const turn = { question, settings, answers, ends: new AbortController(), left: answers.length };
  turns.push(turn);
  const grid = make("div", { className: "answers" }, ...answers.map(answerSection));
  grid.style.setProperty("--columns", answers.length);
  const title = make("p", { className: "question" }, question);
  byId("turns").append(make("article", { className: "turn" }, title, grid));
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  for (const answer of answers) askColumn(turn, answer); // at once: they share the forwards
  showBusy();
}

/** Makes the place of an answer, with its figures and buttons. */
function answerSection(answer) {
  const { column } = answer;
  answer.text = make("div", { className: "said waits" });
  answer.figures = make("div", { className: "figures" });
  const prompt = make("pre", { hidden: true, className: "prompt" });
  const tool = (name, onclick) => make("button", { className: "quiet", onclick }, name);
  const tools = make(
    "div",
    { className: "tools" },
    tool("prompt", () => showPrompt(answer, prompt)),
    tool("curl", () => showCode(curlOf(answer.body))),
    tool("Python", () => showCode(pythonOf(answer.body))),
  );
  const title = make("h4", {}, labelOf(column));
  const name = `answer ${column.number === 0 ? "is-base" : ""}`;
  const parts = [title, answer.text, answer.figures, tools, prompt];
  return make("section", { className: name, ariaLabel: labelOf(column) }, ...parts);
}

/** Asks for an answer, and shows it as it comes. */
async function askColumn(turn, answer) {
  const show = (result) => {
    answer.result = result;
    keepEndInView(() => {
      answer.text.textContent = result.text;
      answer.figures.textContent = figuresOf(result);
    });
  };
  try {
    answer.result = await streamAnswer(answer.body, show, turn.ends.signal);
  } catch (fault) {
    answer.error = faultText(fault) ?? "stopped";
    answer.figures.replaceChildren(make("p", { className: "bad", role: "alert" }, answer.error));
  }
  answer.text.classList.remove("waits");
  answer.done = true;
  turn.left--;
  compare(turn);
  showBusy();
}

/** Keeps the end of the page in view while the page grows. */
function keepEndInView(change) {
  const page = document.scrollingElement;
  const atEnd = page.scrollTop + innerHeight > page.scrollHeight - 40;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

/** Compares every finished answer with the base's, once that has ended. */
function compare(turn) {
  const [base, ...others] = turn.answers;
  if (!base.done || !base.result) return;
  for (const answer of others) {
    if (!answer.done || !answer.result || answer.compared) continue;
    answer.compared = true;
    const words = markedDifferences(base.result.text, answer.result.text);
    keepEndInView(() => answer.text.replaceChildren(...words));
  }
}

function showBusy() {
  const busy = turns.some((turn) => turn.left);
  byId("stop").hidden = !busy;
  byId("send").hidden = busy;
}

function stop() {
  for (const turn of turns) if (turn.left) turn.ends.abort();
}

/** Shows the conversation as the template renders it, with special tokens. */
async function showPrompt(answer, place) {
  place.hidden = !place.hidden;
  if (place.hidden) return;
  try {
    const body = { model: answer.column.name, messages: answer.body.messages };
    const { tokens } = await read("/tokenize", { body });
    const { prompt } = await read("/detokenize", { body: { tokens } });
    place.textContent = prompt;
    place.title = `${tokens.length} tokens`;
  } catch (fault) {
    place.textContent = faultText(fault);
  }
}

/** Saves all turns as a file. */
function exportTurns() {
  const plainAnswer = ({ column, body, result, error }) => ({
    model: column.name,
    weight: column.weight,
    messages: body.messages,
    text: result?.text ?? null,
    figures: result && { ...result, text: undefined },
    error,
  });
  const plainTurns = turns.map(({ question, settings, answers }) => ({
    question,
    settings,
    answers: answers.map(plainAnswer),
  }));
  const text = JSON.stringify({ base: served.base, turns: plainTurns }, null, 2);
  save("answers.json", "application/json", text);
}

function clearTurns() {
  stop();
  turns.length = 0;
  byId("turns").replaceChildren();
  byId("empty").hidden = false;
  showBusy();
  byId("question").focus();
}

function beginAsk() {
  const question = byId("question");
  byId("send").addEventListener("click", ask);
  byId("stop").addEventListener("click", stop);
  byId("new").addEventListener("click", clearTurns);
  byId("export").addEventListener("click", exportTurns);
  byId("settings").addEventListener("input", showSettings);
  byId("differences").addEventListener("change", (event) => {
    byId("turns").classList.toggle("plain", !event.target.checked);
  });
  question.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    const sends = event.ctrlKey || event.metaKey || !(event.shiftKey || touches());
    if (event.key === "Enter" && sends) {
      event.preventDefault();
      if (!turns.some((turn) => turn.left)) ask();
    } else if (event.key === "ArrowUp" && !question.value && turns.length) {
      event.preventDefault();
      question.value = turns.at(-1).question;
    }
  });
  showSettings();
}
