// Bases on this machine: one of them is chosen, and what each of them costs is compared.

/** Returns what a base is called on the page. name: as the server knows it; empty: its own base. */
const titleOf = (name) =>
  lesson.bases.find((base) => base.name === name)?.title ?? (name || served.base);

/** Fills the list of bases; the first is the server's. */
function showBases(chosenBase) {
  const otherBases = lesson.bases.map(({ name, title, folder, bytes: size }) =>
    make("option", { value: name }, [title, folder, bytes(size)].filter(Boolean).join(" · ")),
  );
  const ownBase = make("option", { value: "" }, `${served.base} · this server`);
  const list = byId("method-base");
  list.replaceChildren(ownBase, ...otherBases);
  list.value = chosenBase;
  if (list.selectedIndex < 0) list.value = ""; // the base was removed from the machine
  showBaseNote();
}

/** Says which command serves an adapter of the chosen base. */
function showBaseNote() {
  const base = byId("method-base").value;
  byId("method-base-said").textContent = base
    ? `This server answers with ${served.base}. An adapter of ${titleOf(base)} is kept in the ` +
      `library, and answers once you start: veneer studio --base ${base}`
    : "";
}

async function chooseBase() {
  showBaseNote();
  keepFocus(["#method-base"], () => byId("method-compared").replaceChildren());
  lesson.draft.method = chosenMethod();
  await teachSafely(() => studio(draftPath("/method"), { body: lesson.draft.method }));
  await checkRows(); // another tokenizer counts other tokens
  await planChosen();
}

/** Plans the run on each base, one after another, and shows a table that grows. */
async function compareBases() {
  planning.ends?.abort();
  const { signal } = (planning.ends = new AbortController());
  const head = ["base", "trained", "memory", "time", "fits"].map((title) => make("th", {}, title));
  const table = make("table", { className: "plans" }, make("tr", {}, ...head));
  byId("method-compared").replaceChildren(make("div", { className: "scroll" }, table));
  for (const name of ["", ...lesson.bases.map((base) => base.name)]) {
    const planned = make("td", { colSpan: 4, className: "soft" }, "Planning …");
    const row = make("tr", {}, make("td", {}, baseButton(name)), planned);
    table.append(row);
    const cells = await planCells(name, signal);
    if (signal.aborted) return row.remove();
    planned.replaceWith(...cells);
  }
}

/** Makes a button that chooses a base. */
function baseButton(name) {
  const folder = lesson.bases.find((base) => base.name === name)?.folder;
  const detail = folder ? make("small", { className: "soft" }, ` · ${folder}`) : null;
  const choose = () => {
    byId("method-base").value = name;
    chooseBase();
  };
  return make("button", { className: "quiet", onclick: choose }, titleOf(name), detail);
}

/** Plans the run on a base; returns the cells of its row, or the error as one cell. */
async function planCells(base, signal) {
  try {
    const body = { ...chosenMethod(), base, keep: false };
    const { plans, memory_bytes: memory } = await studio(draftPath("/plan"), { body, signal });
    const [plan] = plans;
    const texts = [
      large(plan.trainable_parameters),
      `${bytes(plan.needed_memory_bytes)} of ${bytes(memory)}`,
      duration(plan.run_seconds),
      FITS[plan.fits],
    ];
    return texts.map((text) => make("td", {}, text));
  } catch (fault) {
    return [make("td", { colSpan: 4, className: "soft" }, faultText(fault) ?? "")];
  }
}

function beginBases() {
  byId("method-base").addEventListener("change", chooseBase);
  byId("bases-compare").addEventListener("click", compareBases);
}
beginBases();
