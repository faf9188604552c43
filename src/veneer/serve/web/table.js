// The Table tab: answers a file of prompts. The browser reads the file, and sends only its prompts.

const AT_ONCE = 5; // browsers open six connections to a server: one stays free
/**
 * file: its name. read: its rows. rows: messages and cells of each prompt. columns: the models.
 * ends: stops the answers. done: number of answers.
 */
const sheet = { file: "", read: [], rows: [], columns: [], ends: null, done: 0 };

async function readFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  const list = byId("table-column");
  sheet.file = file.name;
  try {
    sheet.read = rowsOf(file.name, await file.text());
    const columns = columnsOf(sheet.read);
    const likely = likelyColumn(columns);
    list.replaceChildren(...columns.map((name) => make("option", {}, name)));
    if (likely === null) list.prepend(make("option", { value: "" }, "choose"));
    list.value = likely ?? "";
    list.parentElement.hidden = columns.length < 2;
    takeColumn();
  } catch (fault) {
    list.parentElement.hidden = true;
    refuseFile(fault);
  }
}

/** Takes the prompts of the file from the chosen column. */
function takeColumn() {
  try {
    const column = byId("table-column").value || null;
    const prompts = conversationsOf(sheet.read, column);
    sheet.rows = prompts.map((messages) => ({ messages, cells: [] }));
    [sheet.columns, sheet.done] = [[], 0];
    const from = column === null ? "" : ` of column ${column}`;
    byId("table-said").textContent = `${sheet.file}: ${count(prompts.length)} prompts${from}`;
    byId("table-run").disabled = false;
    showSheet();
  } catch (fault) {
    refuseFile(fault);
  }
}

function refuseFile(fault) {
  sheet.rows = [];
  byId("table-run").disabled = true;
  const text = `${sheet.file}: ${fault.message}`;
  byId("table-said").replaceChildren(make("span", { className: "bad", role: "alert" }, text));
  showSheet();
}

function showSheet() {
  const titles = ["prompt", ...sheet.columns.map(labelOf)];
  const head = make("tr", {}, ...titles.map((title) => make("th", {}, title)));
  const rows = sheet.rows.map((row) => {
    row.cells = sheet.columns.map(() => ({ place: make("td"), result: null }));
    const prompt = row.messages.at(-1).content;
    return make("tr", {}, make("td", {}, String(prompt)), ...row.cells.map((cell) => cell.place));
  });
  byId("answers").replaceChildren(...(sheet.rows.length ? [head, ...rows] : []));
  for (const id of ["table-csv", "table-jsonl"]) byId(id).disabled = !sheet.columns.length;
}

/** Answers all prompts by all models, AT_ONCE at once. */
async function answerAll() {
  sheet.columns = columnsAsked();
  [sheet.ends, sheet.done] = [new AbortController(), 0];
  showSheet();
  const settings = settingsAsked();
  const tasks = sheet.rows.flatMap((row) =>
    sheet.columns.map((column, number) => [row, row.cells[number], column]),
  );
  const all = tasks.length;
  const answerNext = async () => {
    while (tasks.length && !sheet.ends.signal.aborted) {
      await answerCell(...tasks.shift(), settings);
      sheet.done++;
      byId("table-said").textContent = `${count(sheet.done)} of ${count(all)} answers`;
    }
  };
  showTableBusy(true);
  await Promise.all(Array.from({ length: AT_ONCE }, answerNext));
  showTableBusy(false);
}

function showTableBusy(isBusy) {
  byId("table-run").hidden = isBusy;
  byId("table-stop").hidden = !isBusy;
}

/** Asks a model for the answer of a cell, and shows it there. */
async function answerCell(row, cell, { name, weight }, settings) {
  const body = bodyOf({ name, weight }, row.messages, settings);
  const show = ({ text }) => (cell.place.textContent = text);
  try {
    cell.result = await streamAnswer(body, show, sheet.ends.signal);
  } catch (fault) {
    const error = faultText(fault) ?? "stopped";
    cell.place.replaceChildren(make("span", { className: "bad" }, error));
  }
}

/** Writes a text as a cell of a CSV. */
function csvCell(text) {
  const isFormula = /^[=+\-@\t\r]/.test(text); // spreadsheets would run it
  const safe = isFormula ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function saveSheet(kind) {
  const isCsv = kind === "csv";
  const type = isCsv ? "text/csv" : "application/jsonl";
  save(`answers.${kind}`, type, `${(isCsv ? csvLines() : jsonLines()).join("\n")}\n`);
}

function csvLines() {
  const head = ["prompt", ...sheet.columns.map(labelOf)];
  const rows = sheet.rows.map(({ messages, cells }) => [
    messages.at(-1).content,
    ...cells.map((cell) => cell.result?.text ?? ""),
  ]);
  return [head, ...rows].map((row) => row.map(csvCell).join(","));
}

function jsonLines() {
  const names = sheet.columns.map(labelOf);
  return sheet.rows.map(({ messages, cells }) => {
    const answers = names.map((name, number) => [name, cells[number].result?.text ?? null]);
    return JSON.stringify({ messages, answers: Object.fromEntries(answers) });
  });
}

function beginTable() {
  byId("file").addEventListener("change", readFile);
  byId("table-column").addEventListener("change", takeColumn);
  byId("table-run").addEventListener("click", answerAll);
  byId("table-stop").addEventListener("click", () => sheet.ends.abort());
  byId("table-csv").addEventListener("click", () => saveSheet("csv"));
  byId("table-jsonl").addEventListener("click", () => saveSheet("jsonl"));
}
