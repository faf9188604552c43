// The models that answer: the base, and up to three adapters, each with a weight.

const MOST_ADAPTERS = 3;
/** Columns of adapters; the base always has one. number: identifies a column, also after others are removed. */
const chosen = [];
let nextColumn = 1;

/** Returns number, name and weight of each column that has a name. */
function columnsAsked() {
  const named = chosen.filter((column) => column.name && column.name !== served.base);
  return [{ number: 0, name: served.base, weight: 1 }, ...named.map((column) => ({ ...column }))];
}

const labelOf = (column) => (column.weight === 1 ? column.name : `${column.name} × ${column.weight}`);

function addColumn(name = "") {
  if (chosen.length < MOST_ADAPTERS) chosen.push({ number: nextColumn++, name, weight: 1 });
  showColumns();
}

function showColumns() {
  const base = make("div", { className: "column" }, make("b", {}, served.base));
  const free = served.adapters.filter((card) => !chosen.some((column) => column.name === card.id));
  if (chosen.length < MOST_ADAPTERS) {
    const add = () => addColumn(free[0]?.id ?? "");
    base.append(make("button", { className: "quiet add", id: "add-column", onclick: add }, "+ adapter"));
  }
  byId("columns").style.setProperty("--columns", chosen.length + 1);
  byId("columns").replaceChildren(base, ...chosen.map(columnShown));
}

function columnShown(column) {
  const name = make("input", { type: "text", list: "names", value: column.name, spellcheck: false });
  name.setAttribute("aria-label", "Adapter");
  name.placeholder = "name, name@2";
  name.addEventListener("change", () => {
    [column.name, column.number] = [name.value.trim(), nextColumn++]; // another conversation
  });
  const output = make("output", {}, String(column.weight));
  const weight = make("input", { type: "range", min: "0", max: "2", step: "0.05", value: String(column.weight) });
  weight.addEventListener("input", () => {
    column.weight = Number(weight.value);
    output.value = String(column.weight);
  });
  const remove = () => {
    chosen.splice(chosen.indexOf(column), 1);
    showColumns();
  };
  const removal = make("button", { className: "quiet", title: "Take it away", onclick: remove }, "✕");
  return make("div", { className: "column" }, name, removal, make("label", {}, "weight", weight, output));
}
