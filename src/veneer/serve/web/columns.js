// The models that answer: the base, and up to three adapters, each with a weight.

const MOST_ADAPTERS = 3;
/**
 * Columns of adapters; the base always has one.
 * number: identifies a column, also after others are removed.
 */
const chosen = [];
let nextColumn = 1;

/** Returns number, name and weight of each column that has a name. */
function columnsAsked() {
  const named = chosen.filter((column) => column.name && column.name !== served.base);
  return [{ number: 0, name: served.base, weight: 1 }, ...named.map((column) => ({ ...column }))];
}

const labelOf = ({ name, weight }) => (weight === 1 ? name : `${name} × ${weight}`);

function addColumn(name = "") {
  if (chosen.length < MOST_ADAPTERS) chosen.push({ number: nextColumn++, name, weight: 1 });
  showColumns();
}

function showColumns() {
  const base = make("div", { className: "column" }, make("b", {}, served.base));
  const free = served.adapters.filter((card) => !chosen.some((column) => column.name === card.id));
  if (chosen.length < MOST_ADAPTERS) {
    const add = () => addColumn(free[0]?.id ?? "");
    const look = { className: "quiet add", id: "add-column" };
    base.append(make("button", { ...look, onclick: add }, "+ adapter"));
  }
  byId("columns").style.setProperty("--columns", chosen.length + 1);
  byId("columns").replaceChildren(base, ...chosen.map(columnFields));
}

/** Makes the fields of an adapter's column: its name and its weight. */
function columnFields(column) {
  const onclick = () => {
    chosen.splice(chosen.indexOf(column), 1);
    showColumns();
  };
  const removal = make("button", { className: "quiet", title: "Remove it", onclick }, "✕");
  return make("div", { className: "column" }, nameField(column), removal, weightField(column));
}

function nameField(column) {
  const field = make("input", { type: "text", list: "names", spellcheck: false });
  field.setAttribute("aria-label", "Adapter");
  field.placeholder = "name, name@2";
  field.value = column.name;
  field.addEventListener("change", () => {
    [column.name, column.number] = [field.value.trim(), nextColumn++]; // another conversation
  });
  return field;
}

function weightField(column) {
  const output = make("output", {}, String(column.weight));
  const field = make("input", { type: "range", min: "0", max: "2", step: "0.05" });
  field.value = String(column.weight);
  field.addEventListener("input", () => {
    column.weight = Number(field.value);
    output.value = String(column.weight);
  });
  return make("label", {}, "weight", field, output);
}
