// Reads conversations from a file of prompts, in the layouts of `veneer train`, without answers.
// Independent of the page.

const MOST_ROWS = 2000;
const PROMPTS = ["prompt", "question", "instruction", "input", "text"];
const WHOLE = ["messages", "conversations"];
/** ShareGPT's names of roles. */
const ROLES = { human: "user", gpt: "assistant", chatgpt: "assistant", model: "assistant" };
const FIELDS = ["role", "content", "name", "tool_calls", "tool_call_id"];

/** Splits a CSV text into rows of cells; quotes follow RFC 4180. */
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

/** Reads a file's rows: texts, or objects by column. The first line of a CSV names its columns. */
function rowsOf(name, text) {
  const kind = name.split(".").pop().toLowerCase();
  const read = text.replace(/^\uFEFF/, "");
  if (kind === "csv") {
    const [head = [], ...rows] = cellsOf(read);
    const cellOf = (row) => (column, number) => [column.trim(), row[number] ?? ""];
    return rows.map((row) => Object.fromEntries(head.map(cellOf(row))));
  }
  if (kind === "json" && /^\s*\[/.test(read)) return JSON.parse(read);
  const lines = read.split("\n");
  if (kind !== "jsonl" && kind !== "json") return lines.filter((line) => line.trim());
  return lines.flatMap((line, number) => {
    if (!line.trim()) return [];
    try {
      return [JSON.parse(line)];
    } catch (fault) {
      throw new Error(`line ${number + 1} is not JSON: ${fault.message}`);
    }
  });
}

/** Returns the columns that may have prompts. */
function columnsOf(rows) {
  const isObject = (row) => row && typeof row === "object" && !Array.isArray(row);
  const objects = rows.slice(0, 100).filter(isObject);
  return [...new Set(objects.flatMap(Object.keys))];
}

/** Returns the column whose name is one of prompts, in any case; else the only one; else null. */
function likelyColumn(columns) {
  const columnOf = (name) => columns.find((column) => column.toLowerCase() === name);
  const likely = [...WHOLE, ...PROMPTS].map(columnOf).find((column) => column !== undefined);
  return likely ?? (columns.length === 1 ? columns[0] : null);
}

/** Returns a message with the fields that a request may have; from and value are ShareGPT's. */
function messageOf(message) {
  const isShareGpt = message?.from !== undefined;
  const fields = isShareGpt ? { role: message.from, content: message.value } : (message ?? {});
  const isKnown = ([name, value]) => FIELDS.includes(name) && value !== null;
  const known = Object.fromEntries(Object.entries(fields).filter(isKnown));
  return { ...known, role: ROLES[known.role] ?? known.role };
}

/** Reads a cell as a list of messages, also from text in a CSV; null if it is not one. */
function listIn(cell) {
  if (typeof cell !== "string") return Array.isArray(cell) ? cell : null;
  if (!/^\s*\[\s*\{/.test(cell)) return null;
  try {
    return JSON.parse(cell);
  } catch {
    return null;
  }
}

/** Returns the messages of a row up to the one to answer. Throws a fault of the row. */
function conversationOf(row, column, where) {
  const messages = messagesIn(row, column);
  if (!messages?.length || messages.some((message) => !message.role))
    throw new Error(`${where} has nothing in ${column ? `column ${column}` : "it"}`);
  const system = typeof row?.system === "string" ? row.system : "";
  if (system.trim() && messages[0].role !== "system")
    messages.unshift({ role: "system", content: system });
  return messages;
}

/** Returns the messages in a column of a row; null if there are none. */
function messagesIn(row, column) {
  const cell = typeof row === "string" ? row : row?.[column];
  const messages = listIn(cell)?.map(messageOf);
  if (messages && WHOLE.includes(column.toLowerCase())) {
    const last = messages.findLastIndex((message) => message.role !== "assistant");
    return messages.slice(0, last + 1); // without the expected answer
  }
  if (messages || typeof cell !== "string" || !cell.trim()) return messages;
  const hasInput = column?.toLowerCase() === "instruction" && typeof row.input === "string";
  const input = hasInput && row.input.trim() ? `\n\n${row.input}` : "";
  return [{ role: "user", content: cell + input }]; // as Alpaca's rows are trained
}

/** Returns the conversations of all rows, from one column. */
function conversationsOf(rows, column) {
  if (rows.length > MOST_ROWS)
    throw new Error(`it has ${rows.length} prompts; ${MOST_ROWS} are allowed`);
  if (!rows.length) throw new Error("there is no prompt in it");
  const columns = columnsOf(rows);
  if (columns.length && column === null)
    throw new Error(`choose the column of the prompts: ${columns.join(", ")}`);
  return rows.map((row, number) => conversationOf(row, column, `prompt ${number + 1}`));
}
