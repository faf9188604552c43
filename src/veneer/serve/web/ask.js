// The Ask tab: turns of a conversation. Each turn has a question and the answers of all columns.

/** A turn: question, settings, system; answers: column, messages, found (figures and text), error; ends: stops it. */
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

/** Returns one column's conversation with a new question. Turns without an answer of this column are left out. */
function messagesOf(number, question) {
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    const own = turn.answers.find((answer) => answer.column.number === number);
    if (!own?.found?.text) continue;
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content: own.found.text });
  }
  return [...messages, { role: "user", content: question }];
}

function ask() {
  const question = byId("question").value.trim();
  if (!question || !served.base) return;
  byId("question").value = "";
  byId("empty").hidden = true;
  const settings = settingsAsked();
  const answers = columnsAsked().map((column) => ({
    column,
    body: bodyOf({ name: column.name, weight: column.weight }, messagesOf(column.number, question), settings),
    found: null,
    error: null,
  }));
  const turn = { question, settings, answers, ends: new AbortController(), left: answers.length };
  turns.push(turn);
  const grid = make("div", { className: "answers" }, ...answers.map(answerShown));
  grid.style.setProperty("--columns", answers.length);
  byId("turns").append(make("article", { className: "turn" }, make("p", { className: "question" }, question), grid));
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  for (const answer of answers) follow(turn, answer); // at once, so that they are answered in the same forwards
  showBusy();
}

function answerShown(answer) {
  const { column } = answer;
  answer.text = make("div", { className: "said waits" });
  answer.figures = make("div", { className: "figures" });
  const prompt = make("pre", { hidden: true, className: "prompt" });
  const tools = make(
    "div",
    { className: "tools" },
    make("button", { className: "quiet", onclick: () => showPrompt(answer, prompt) }, "prompt"),
    make("button", { className: "quiet", onclick: () => showCode(curlOf(answer.body)) }, "curl"),
    make("button", { className: "quiet", onclick: () => showCode(pythonOf(answer.body)) }, "Python"),
  );
  const title = make("h4", {}, labelOf(column));
  const name = `answer ${column.number === 0 ? "is-base" : ""}`;
  const parts = [title, answer.text, answer.figures, tools, prompt];
  return make("section", { className: name, ariaLabel: labelOf(column) }, ...parts);
}

async function follow(turn, answer) {
  try {
    answer.found = await answered(
      answer.body,
      (found) => {
        answer.found = found;
        keepingTheEnd(() => {
          answer.text.textContent = found.text;
          answer.figures.textContent = figuresOf(found);
        });
      },
      turn.ends.signal,
    );
  } catch (fault) {
    answer.error = said(fault) ?? "stopped";
    answer.figures.replaceChildren(make("p", { className: "bad", role: "alert" }, answer.error));
  }
  answer.text.classList.remove("waits");
  answer.done = true;
  turn.left--;
  compare(turn);
  showBusy();
}

/** Keeps the end of the page in view while the page grows. */
function keepingTheEnd(change) {
  const page = document.scrollingElement;
  const atEnd = page.scrollTop + innerHeight > page.scrollHeight - 40;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

/** Compares every finished answer with the base's, once that has ended. */
function compare(turn) {
  const [base, ...others] = turn.answers;
  if (!base.done || !base.found) return;
  for (const answer of others) {
    if (!answer.done || !answer.found || answer.compared) continue;
    answer.compared = true;
    keepingTheEnd(() => answer.text.replaceChildren(...shownDifferences(base.found.text, answer.found.text)));
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
    const { tokens } = await read("/tokenize", { body: { model: answer.column.name, messages: answer.body.messages } });
    const { prompt } = await read("/detokenize", { body: { tokens } });
    place.textContent = prompt;
    place.title = `${tokens.length} tokens`;
  } catch (fault) {
    place.textContent = said(fault);
  }
}

function exported() {
  const told = turns.map(({ question, settings, answers }) => ({
    question,
    settings,
    answers: answers.map(({ column, body, found, error }) => ({
      model: column.name,
      weight: column.weight,
      messages: body.messages,
      text: found?.text ?? null,
      figures: found && { ...found, text: undefined },
      error,
    })),
  }));
  save("answers.json", "application/json", JSON.stringify({ base: served.base, turns: told }, null, 2));
}

function startAnew() {
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
  byId("new").addEventListener("click", startAnew);
  byId("export").addEventListener("click", exported);
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
