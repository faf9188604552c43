// The Table tab: answers a file of prompts. The file is read in the browser, and only its prompts are sent.

const AT_ONCE = 5; // browsers open six connections to a server: one stays free
const sheet = { file: "", read: [], rows: [], columns: [], ends: null, done: 0 };

async function readFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  const choice = byId("table-column");
  sheet.file = file.name;
  try {
    sheet.read = rowsOf(file.name, await file.text());
    const columns = columnsOf(sheet.read);
    const meant = columnMeant(columns);
    choice.replaceChildren(...columns.map((name) => make("option", {}, name)));
    if (meant === null) choice.prepend(make("option", { value: "" }, "choose"));
    choice.value = meant ?? "";
    choice.parentElement.hidden = columns.length < 2;
    takeColumn();
  } catch (fault) {
    choice.parentElement.hidden = true;
    refuseFile(fault);
  }
}

/** Returns the prompts of the file from the chosen column. */
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
  const told = make("span", { className: "bad", role: "alert" }, `${sheet.file}: ${fault.message}`);
  byId("table-said").replaceChildren(told);
  showSheet();
}

function showSheet() {
  const head = make("tr", {}, make("th", {}, "prompt"), ...sheet.columns.map((each) => make("th", {}, labelOf(each))));
  const rows = sheet.rows.map((row) => {
    row.cells = sheet.columns.map(() => ({ place: make("td"), found: null, error: null }));
    const prompt = row.messages.at(-1).content;
    return make("tr", {}, make("td", {}, String(prompt)), ...row.cells.map((cell) => cell.place));
  });
  byId("answers").replaceChildren(...(sheet.rows.length ? [head, ...rows] : []));
  for (const id of ["table-csv", "table-jsonl"]) byId(id).disabled = !sheet.columns.length;
}

async function answerAll() {
  sheet.columns = columnsAsked();
  [sheet.ends, sheet.done] = [new AbortController(), 0];
  showSheet();
  const settings = settingsAsked();
  const left = sheet.rows.flatMap((row) => row.cells.map((cell, n) => [row, cell, sheet.columns[n]]));
  const all = left.length;
  const busy = (is) => ((byId("table-run").hidden = is), (byId("table-stop").hidden = !is));
  const work = async () => {
    while (left.length && !sheet.ends.signal.aborted) {
      const [row, cell, column] = left.shift();
      try {
        const body = bodyOf({ name: column.name, weight: column.weight }, row.messages, settings);
        cell.found = await answered(body, (found) => (cell.place.textContent = found.text), sheet.ends.signal);
      } catch (fault) {
        cell.error = said(fault) ?? "stopped";
        cell.place.replaceChildren(make("span", { className: "bad" }, cell.error));
      }
      sheet.done++;
      byId("table-said").textContent = `${count(sheet.done)} of ${count(all)} answers`;
    }
  };
  busy(true);
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  busy(false);
}

const spelled = (text) => {
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text; // spreadsheets would run it as a formula
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
};

function saveSheet(kind) {
  const texts = (row) => row.cells.map((cell) => cell.found?.text ?? "");
  const names = sheet.columns.map(labelOf);
  const lines = sheet.rows.map((row) => {
    if (kind === "csv") return [row.messages.at(-1).content, ...texts(row)].map(spelled).join(",");
    const answers = Object.fromEntries(names.map((name, n) => [name, row.cells[n].found?.text ?? null]));
    return JSON.stringify({ messages: row.messages, answers });
  });
  if (kind === "csv") lines.unshift(["prompt", ...names].map(spelled).join(","));
  save(`answers.${kind}`, kind === "csv" ? "text/csv" : "application/jsonl", `${lines.join("\n")}\n`);
}

function beginTable() {
  byId("file").addEventListener("change", readFile);
  byId("table-column").addEventListener("change", takeColumn);
  byId("table-run").addEventListener("click", answerAll);
  byId("table-stop").addEventListener("click", () => sheet.ends.abort());
  byId("table-csv").addEventListener("click", () => saveSheet("csv"));
  byId("table-jsonl").addEventListener("click", () => saveSheet("jsonl"));
}
