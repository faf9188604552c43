// A file of prompts to a table: it is read here, and only its prompts are sent.

const MOST_ROWS = 2000;
const AT_ONCE = 5; // browsers open six connections to a server: one stays free
const PROMPTS = ["prompt", "question", "instruction", "input", "text"];
const sheet = { rows: [], columns: [], ends: null, done: 0 };

/** Cells of a CSV text, row by row; quotes as RFC 4180 has them. */
function cellsOf(text) {
  const rows = [[""]];
  let within = false;
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    const row = rows.at(-1);
    if (within) {
      if (c !== '"') row[row.length - 1] += c;
      else if (text[i + 1] === '"') (row[row.length - 1] += c), i++;
      else within = false;
    } else if (c === '"') within = true;
    else if (c === ",") row.push("");
    else if (c === "\n") rows.push([""]);
    else if (c !== "\r") row[row.length - 1] += c;
  }
  return rows.filter((row) => row.some((cell) => cell.trim()));
}

/** Messages of one line of a file. Throws what is wrong with it. */
function conversationOf(value, where) {
  if (typeof value === "string" && value.trim()) return [{ role: "user", content: value }];
  if (Array.isArray(value?.messages)) {
    const last = value.messages.findLastIndex((message) => message.role !== "assistant");
    if (last >= 0) return value.messages.slice(0, last + 1); // what it should answer is not told
  }
  const name = PROMPTS.find((each) => typeof value?.[each] === "string" && value[each].trim());
  if (!name) throw new Error(`${where} has no ${PROMPTS.join(", ")} or messages`);
  return [{ role: "user", content: value[name] }];
}

function conversationsOf(name, text) {
  const kind = name.split(".").pop().toLowerCase();
  let values;
  if (kind === "csv") {
    const [head, ...rows] = cellsOf(text);
    const column = Math.max(0, head.findIndex((cell) => PROMPTS.includes(cell.trim().toLowerCase())));
    const named = PROMPTS.includes(head[column]?.trim().toLowerCase());
    values = (named ? rows : [head, ...rows]).map((row) => row[column]);
  } else if (kind === "json" && text.trim().startsWith("[")) values = JSON.parse(text);
  else if (kind === "jsonl" || kind === "json")
    values = text.split("\n").flatMap((line, number) => {
      if (!line.trim()) return [];
      try {
        return [JSON.parse(line)];
      } catch (fault) {
        throw new Error(`line ${number + 1} is not JSON: ${fault.message}`);
      }
    });
  else values = text.split("\n").filter((line) => line.trim());
  if (values.length > MOST_ROWS) throw new Error(`${count(values.length)} prompts, and ${count(MOST_ROWS)} may be`);
  return values.map((value, number) => conversationOf(value, `prompt ${number + 1}`));
}

async function readFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    const read = conversationsOf(file.name, await file.text());
    if (!read.length) throw new Error("there is no prompt in it");
    sheet.rows = read.map((messages) => ({ messages, cells: [] }));
    [sheet.columns, sheet.done] = [[], 0];
    byId("table-said").textContent = `${file.name}: ${count(read.length)} prompts`;
    byId("table-run").disabled = false;
  } catch (fault) {
    sheet.rows = [];
    byId("table-run").disabled = true;
    const told = make("span", { className: "bad", role: "alert" }, `${file.name}: ${fault.message}`);
    byId("table-said").replaceChildren(told);
  }
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
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text; // spreadsheets would compute it
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
  byId("table-run").addEventListener("click", answerAll);
  byId("table-stop").addEventListener("click", () => sheet.ends.abort());
  byId("table-csv").addEventListener("click", () => saveSheet("csv"));
  byId("table-jsonl").addEventListener("click", () => saveSheet("jsonl"));
}
