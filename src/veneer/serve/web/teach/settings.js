// Fields of a run's settings. Their help texts, defaults and choices come from the server.

const MAIN_SETTINGS = ["method.rank", "epochs", "learning_rate"];
const OBJECTIVE = "objective.name";
const OBJECTIVES = {
  answers: "answers: write them as the rows do",
  dpo: "dpo: prefer the good answer to the bad one",
  ipo: "ipo: prefer it by a fixed margin",
  orpo: "orpo: write the good answer, and prefer it",
  kto: "kto: learn from answers rated good or bad",
  distil: "distil: answer as the teacher does",
  classify: "classify: give a text its label",
};
const SETTING_TITLES = {
  "objective.system": "the teacher's system prompt",
};
/** Shorter help than that of the command line. */
const SETTING_HELP = {
  learning_rate: "Leave empty: chosen for the base.",
  "method.alpha": "Strength of the update.",
};
/** Settings that the page chooses itself. */
const HIDDEN_SETTINGS = ["micro_batch"];
const TEXT_SETTINGS = ["objective.system"];
/** A setting whose file is uploaded (document.js). */
const DOCUMENT = "objective.document";
/** Methods with the settings `method.…` that the page offers. */
const LOW_RANK = ["lora", "qlora", "dora"];

const settingTitle = (path) =>
  SETTING_TITLES[path] ?? path.replace("method.", "").replaceAll("_", " ");

/** Makes a field with its help text. An empty field means the default. */
function settingField(path, value) {
  const { help, default: usual, choices } = lesson.settings[path];
  const noDefault = TEXT_SETTINGS.includes(path) ? "none" : "default";
  const empty = usual === null ? noDefault : `default: ${usual}`;
  const words = typeof usual === "boolean" ? ["true", "false"] : choices;
  const field = words.length ? wordField(words, empty) : textField(path, empty);
  field.value = value === undefined ? "" : String(value);
  field.dataset.path = path;
  const title = make("span", {}, settingTitle(path));
  const text = make("small", {}, SETTING_HELP[path] ?? help);
  return make("label", { className: "setting" }, title, field, text);
}

function wordField(words, empty) {
  const options = words.map((word) => make("option", { value: word }, word));
  return make("select", {}, make("option", { value: "" }, empty), ...options);
}

function textField(path, placeholder) {
  const inputMode = TEXT_SETTINGS.includes(path) ? "text" : "decimal";
  return make("input", { type: "text", inputMode, placeholder, autocomplete: "off" });
}

/** Reads a field's value: true, false, a number, or a text. Returns undefined if it is empty. */
function settingValue(field) {
  const text = field.value.trim();
  if (!text) return undefined;
  if (text === "true" || text === "false") return text === "true";
  return Number.isNaN(Number(text)) ? text : Number(text);
}

/** Whether a method has this setting. */
const applies = (path, method) => !path.startsWith("method.") || LOW_RANK.includes(method);

/** Lists the objectives that learn from the rows; the first is the usual one. */
function showObjectives(chosenName) {
  const list = byId("method-objective");
  const names = lesson.preview.objectives;
  list.replaceChildren(...optionsOf(Object.fromEntries(names.map((n) => [n, OBJECTIVES[n]]))));
  list.value = names.includes(chosenName) ? chosenName : names[0];
}

const settingOf = (path) => document.querySelector(`#step-method [data-path="${path}"]`);

/** Shows what the teacher reads only with the objective that has a teacher. */
function showTeacher() {
  const hasTeacher = byId("method-objective").value === "distil";
  const system = settingOf("objective.system");
  system.closest("label").hidden = byId("document-field").hidden = !hasTeacher;
  if (!hasTeacher) system.value = "";
}

/** Shows the fields of a method. values: by path */
function showMethodSettings(method, values) {
  const elsewhere = [DOCUMENT, OBJECTIVE, ...HIDDEN_SETTINGS];
  const isField = (path) => !elsewhere.includes(path) && applies(path, method);
  const paths = Object.keys(lesson.settings).filter(isField);
  const main = MAIN_SETTINGS.filter((path) => paths.includes(path));
  const more = paths.filter((path) => !MAIN_SETTINGS.includes(path));
  const fieldsOf = (names) => names.map((path) => settingField(path, values[path]));
  byId("main-settings").replaceChildren(...fieldsOf(main));
  byId("more-settings").replaceChildren(...fieldsOf(more));
  byId("document-help").textContent = lesson.settings[DOCUMENT].help;
  showDocument();
  showTeacher();
}

/** Returns the settings that are not empty, by their path. */
function chosenSettings() {
  const fields = document.querySelectorAll("#step-method [data-path]");
  const pairs = [...fields].map((field) => [field.dataset.path, settingValue(field)]);
  const values = Object.fromEntries(pairs.filter(([, value]) => value !== undefined));
  const objective = byId("method-objective").value;
  return objective ? { ...values, [OBJECTIVE]: objective } : values;
}
