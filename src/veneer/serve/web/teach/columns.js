// Step 1: which columns hold what, and the first rows as they will be trained on.

const LAYOUTS = {
  auto: "recognise it",
  prompt_completion: "question and answer",
  chat: "messages",
  alpaca: "instruction, input, output",
  sharegpt: "conversations (ShareGPT)",
  text: "plain text",
  pairs: "a good and a bad answer",
};
/** Names of a layout in plain words. */
const NAMES = { prompt: "question", completion: "answer", system: "system message", output: "answer" };
const TRAIN_ON = { assistant: "every answer", last: "the last answer", all: "all tokens" };
const LONG_ROWS = { refuse: "are an error", drop: "are left out", cut: "are cut" };

const optionsOf = (words) => Object.entries(words).map(([value, text]) => make("option", { value }, text));

/** Returns the choices that the fields show. */
function chosenRows() {
  const columns = {};
  for (const select of byId("rows-columns").querySelectorAll("select"))
    if (select.value) columns[select.dataset.name] = select.value;
  return {
    layout: byId("rows-layout").value,
    columns,
    validation_share: Number(byId("rows-share").value) / 100,
    train_on: byId("rows-train-on").value,
    length: Number(byId("rows-length").value),
    long_rows: byId("rows-long").value,
  };
}

function showChoices() {
  const { choices, name, bytes: size } = lesson.draft;
  byId("rows-name").textContent = name;
  byId("rows-name").append(make("small", { className: "soft" }, ` ${bytes(size)}`));
  byId("rows-layout").value = choices.layout;
  byId("rows-share").value = Number((choices.validation_share * 100).toFixed(2));
  byId("rows-length").value = choices.length;
  byId("rows-train-on").value = choices.train_on;
  byId("rows-long").value = choices.long_rows;
}

function showColumnChoices() {
  const { columns, needed, optional, likely, layout, reason } = lesson.preview;
  const chosen = lesson.draft.choices.columns;
  const fields = [...needed, ...optional].map((name) => {
    const empty = optional.includes(name) ? "none" : "choose";
    const select = make("select", {}, make("option", { value: "" }, empty));
    for (const column of columns)
      select.append(make("option", { value: column.name, title: column.example }, column.name));
    select.dataset.name = name;
    select.value = chosen[name] ?? likely[name] ?? "";
    return make("label", {}, NAMES[name] ?? name, select);
  });
  byId("rows-columns").replaceChildren(...fields);
  byId("rows-columns").hidden = !layout && lesson.draft.choices.layout === "auto";
  const open = needed.filter((name) => !byId("rows-columns").querySelector(`[data-name="${name}"]`).value);
  const missing = open.map((name) => NAMES[name] ?? name).join(" and ");
  byId("rows-reason").textContent = reason
    ? `The layout is not recognised: ${reason}. Choose it.`
    : missing && `Choose the column of the ${missing}.`;
}

/** Shows a row as messages, or what is wrong with it. */
function rowCard(row) {
  const parts = row.fault
    ? [make("p", { className: "bad" }, row.fault), make("p", { className: "soft" }, row.next_step)]
    : row.messages.map(({ role, content }) => messageCell(role, content, role));
  return make("article", { className: "card" }, make("small", { className: "soft" }, `row ${row.line}`), ...parts);
}

/** Whether every column that the layout needs is chosen, or has the layout's own name. */
function columnsAreChosen() {
  const { columns, needed, layout } = lesson.preview;
  const { choices } = lesson.draft;
  const has = (name) => name in choices.columns || columns.some((column) => column.name === name);
  return layout !== null && (choices.layout === "auto" || needed.every(has));
}

/** Shows the first records as a table of their columns. */
function recordsTable() {
  const { columns, records } = lesson.preview;
  const head = make("tr", {}, ...columns.map((column) => make("th", {}, column.name)));
  const rows = records.map(({ cells }) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell))));
  return make("div", { className: "scroll" }, make("table", { className: "records" }, head, ...rows));
}

/** Shows three rows as they will be trained on, or as they are in the file while columns are to be chosen. */
function showPreview() {
  const chosen = columnsAreChosen();
  const shown = chosen ? lesson.preview.rows.map(rowCard) : lesson.preview.columns.length ? [recordsTable()] : [];
  byId("rows-preview").className = chosen ? "cards" : "";
  byId("rows-preview").replaceChildren(...shown);
}

/** Sends the choices, and shows the rows that they make. Then checks all rows. */
async function chooseRows() {
  const body = chosenRows();
  const kept = await teachSafely(async () => {
    const { preview, ...draft } = await studio(draftPath("/rows"), { body });
    Object.assign(lesson, { draft, preview, report: null, plan: null });
  });
  if (!kept) return;
  showColumnChoices();
  showPreview();
  await checkChosenRows();
}

/** Checks the rows once their columns are chosen. */
async function checkChosenRows() {
  if (columnsAreChosen() || !lesson.preview.columns.length) return checkRows();
  byId("rows-check").replaceChildren();
  showSteps();
}

function beginColumns() {
  byId("rows-layout").append(...optionsOf(LAYOUTS));
  byId("rows-train-on").append(...optionsOf(TRAIN_ON));
  byId("rows-long").append(...optionsOf(LONG_ROWS));
  byId("rows-layout").addEventListener("change", () => {
    byId("rows-columns").replaceChildren(); // names of another layout
    chooseRows();
  });
  byId("rows-columns").addEventListener("change", chooseRows);
  for (const id of ["rows-share", "rows-length", "rows-train-on", "rows-long"])
    byId(id).addEventListener("change", chooseRows);
}
beginColumns();
