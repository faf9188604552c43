// Step 1: which columns hold what, and the first rows as they will be trained on. Before an upload
// it shows the place to drop a file (upload.js), after it also the check of all rows (findings.js).

const LAYOUTS = {
  auto: "recognise it",
  prompt_completion: "question and answer",
  chat: "messages",
  alpaca: "instruction, input, output",
  sharegpt: "conversations (ShareGPT)",
  text: "plain text",
  pairs: "a good and a bad answer",
  ratings: "an answer and its rating",
  labels: "a text and its label",
};
/** Names of a layout's columns in plain words. */
const COLUMN_TITLES = {
  prompt: "question",
  completion: "answer",
  system: "system message",
  output: "answer",
  chosen: "good answer",
  rejected: "bad answer",
};
const TRAIN_ON = { assistant: "every answer", last: "the last answer", all: "all tokens" };
const LONG_ROWS = { refuse: "are an error", drop: "are left out", cut: "are cut" };

const columnTitle = (name) => COLUMN_TITLES[name] ?? name;

const optionsOf = (choices) =>
  Object.entries(choices).map(([value, text]) => make("option", { value }, text));

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

/** Shows a list of columns for each name of the layout, and says which of them is missing. */
function showColumnChoices() {
  const { needed, optional, layout, reason } = lesson.preview;
  const place = byId("rows-columns");
  const fieldOf = (name) => columnField(name, optional.includes(name));
  const fields = [...needed, ...optional].map(fieldOf);
  const { name: focused } = document.activeElement.dataset;
  keepFocus([`[data-name="${focused}"]`, "#rows-layout"], () => place.replaceChildren(...fields));
  place.hidden = !layout && lesson.draft.choices.layout === "auto";
  const isMissing = (name) => !place.querySelector(`[data-name="${name}"]`).value;
  const missing = needed.filter(isMissing).map(columnTitle).join(" and ");
  byId("rows-reason").textContent = reason
    ? `The layout is not recognised: ${reason}. Choose one.`
    : missing && `Choose the column of ${missing}.`;
}

/** Makes a list of the file's columns for one name of the layout. */
function columnField(name, isOptional) {
  const { columns, likely } = lesson.preview;
  const options = columns.map((column) =>
    make("option", { value: column.name, title: column.example }, column.name),
  );
  const empty = make("option", { value: "" }, isOptional ? "none" : "choose");
  const select = make("select", {}, empty, ...options);
  select.dataset.name = name;
  select.value = lesson.draft.choices.columns[name] ?? likely[name] ?? "";
  return make("label", {}, columnTitle(name), select);
}

/** Whether every column that the layout needs is chosen, or has the layout's own name. */
function columnsAreChosen() {
  const { columns, needed, layout } = lesson.preview;
  const { choices } = lesson.draft;
  const isThere = (name) =>
    name in choices.columns || columns.some((column) => column.name === name);
  return layout !== null && (choices.layout === "auto" || needed.every(isThere));
}

/** Makes a card of a row as messages, or of what is wrong with it. */
function rowCard(row) {
  const parts = row.fault
    ? [make("p", { className: "bad" }, row.fault), make("p", { className: "soft" }, row.next_step)]
    : row.messages.map(({ role, content }) => messageCell(role, content, role));
  const title = make("small", { className: "soft" }, `row ${row.line}`);
  return make("article", { className: "card" }, title, ...parts);
}

/** Makes a table of the first records as they are in the file. */
function recordsTable() {
  const { columns, records } = lesson.preview;
  const head = make("tr", {}, ...columns.map((column) => make("th", {}, column.name)));
  const rows = records.map(({ cells }) =>
    make("tr", {}, ...cells.map((cell) => make("td", {}, cell))),
  );
  const table = make("table", { className: "records" }, head, ...rows);
  return make("div", { className: "scroll" }, table);
}

/** Shows the first rows as they will be trained on; until columns are chosen, as in the file. */
function showPreview() {
  const { columns, rows } = lesson.preview;
  const place = byId("rows-preview");
  const isChosen = columnsAreChosen();
  place.className = isChosen ? "cards" : "";
  if (isChosen) place.replaceChildren(...rows.map(rowCard));
  else place.replaceChildren(...(columns.length ? [recordsTable()] : []));
}

/** Sends the choices, and shows the rows that they make. Then checks all rows. */
async function chooseRows() {
  const body = chosenRows();
  const isStored = await teachSafely(async () => {
    const { preview, ...draft } = await studio(draftPath("/rows"), { body });
    Object.assign(lesson, { draft, preview, report: null, plan: null });
  });
  if (!isStored) return;
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

async function showRows() {
  byId("upload").hidden = lesson.draft !== null;
  byId("rows-open").hidden = lesson.draft === null;
  if (lesson.draft === null) return;
  showChoices();
  showColumnChoices();
  showPreview();
  if (lesson.report === null) await checkChosenRows();
  else showReport(lesson.report);
}

function beginRows() {
  byId("rows-layout").append(...optionsOf(LAYOUTS));
  byId("rows-train-on").append(...optionsOf(TRAIN_ON));
  byId("rows-long").append(...optionsOf(LONG_ROWS));
  byId("rows-layout").addEventListener("change", () => {
    byId("rows-columns").replaceChildren(); // names of another layout
    chooseRows();
  });
  for (const id of ["rows-columns", "rows-share", "rows-length", "rows-train-on", "rows-long"])
    byId(id).addEventListener("change", chooseRows);
  byId("rows-next").addEventListener("click", () => openStep("method"));
  whenStepShown.rows = showRows;
}
beginRows();
