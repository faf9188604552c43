// Fields of a run's settings. Their help texts, defaults and choices come from the server.

const MAIN_SETTINGS = ["method.rank", "epochs", "learning_rate"];

const NAMES_OF_SETTINGS = { "objective.name": "objective", "objective.system": "the teacher's system prompt" };

/** Makes a field for a setting. An empty field means the default. */
function settingField(path, value) {
  const { help, default: usual, choices } = lesson.settings[path];
  const empty = usual === null ? "default" : `default: ${usual}`;
  const words = choices.length ? choices : typeof usual === "boolean" ? ["true", "false"] : null;
  const options = (words ?? []).map((word) => make("option", { value: word }, word));
  const field = words
    ? make("select", {}, make("option", { value: "" }, empty), ...options)
    : make("input", { type: "text", inputMode: path === "objective.system" ? "text" : "decimal", placeholder: empty, autocomplete: "off" });
  field.value = value === undefined ? "" : String(value);
  field.dataset.path = path;
  const name = NAMES_OF_SETTINGS[path] ?? path.replace("method.", "").replaceAll("_", " ");
  return make("label", { className: "setting" }, make("span", {}, name), field, make("small", {}, help));
}

/** Reads a field's value: true, false, a number, or a text. Returns undefined if it is empty. */
function settingValue(field) {
  const text = field.value.trim();
  if (!text) return undefined;
  if (text === "true" || text === "false") return text === "true";
  return Number.isNaN(Number(text)) ? text : Number(text);
}

const LOW_RANK = ["lora", "qlora", "dora"];
/** Whether a method has this setting. */
const applies = (path, method) => !path.startsWith("method.") || LOW_RANK.includes(method);

/** Shows the teacher's system prompt only with the objective that has a teacher. */
function showTeacher() {
  const objective = document.querySelector('[data-path="objective.name"]');
  const system = document.querySelector('[data-path="objective.system"]');
  system.closest("label").hidden = objective.value !== "distil";
  if (objective.value !== "distil") system.value = "";
}

function showMethodSettings(method, values) {
  const paths = Object.keys(lesson.settings).filter((path) => applies(path, method));
  const fields = (wanted) => wanted.map((path) => settingField(path, values[path]));
  byId("main-settings").replaceChildren(...fields(MAIN_SETTINGS.filter((path) => paths.includes(path))));
  byId("more-settings").replaceChildren(...fields(paths.filter((path) => !MAIN_SETTINGS.includes(path))));
  showTeacher();
}

/** Returns the settings that are not empty, by their path. */
function chosenSettings() {
  const fields = document.querySelectorAll("#step-method [data-path]");
  const pairs = [...fields].map((field) => [field.dataset.path, settingValue(field)]);
  return Object.fromEntries(pairs.filter(([, value]) => value !== undefined));
}
