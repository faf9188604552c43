// Bases on this machine: one of them is chosen, and what each of them costs is compared.

/** Fills the list of bases; the first is the server's. */
function showBases(chosenBase) {
  const others = lesson.bases.map(({ name, bytes: size }) => make("option", { value: name }, `${name} · ${bytes(size)}`));
  byId("method-base").replaceChildren(make("option", { value: "" }, `${served.base} · this server`), ...others);
  byId("method-base").value = chosenBase;
  if (byId("method-base").selectedIndex < 0) byId("method-base").value = ""; // it was removed from the machine
  showBaseSaid();
}

function showBaseSaid() {
  const base = byId("method-base").value;
  byId("method-base-said").textContent = base
    ? `This server answers with ${served.base}. An adapter of ${base} is kept in the library, and answers once you start: ` +
      `veneer studio --base ${base}`
    : "";
}

async function chooseBase() {
  showBaseSaid();
  byId("method-compared").replaceChildren();
  await planChosen();
  await checkRows(); // another tokenizer counts other tokens
}

/** Plans the run on each base, one after another, and shows a table that grows. */
async function compareBases() {
  planning.ends?.abort();
  const { signal } = (planning.ends = new AbortController());
  const head = ["base", "trained", "memory", "time", "fits"].map((name) => make("th", {}, name));
  const table = make("table", { className: "plans" }, make("tr", {}, ...head));
  byId("method-compared").replaceChildren(make("div", { className: "scroll" }, table));
  for (const base of ["", ...lesson.bases.map(({ name }) => name)]) {
    const choose = () => {
      byId("method-base").value = base;
      chooseBase();
    };
    const button = make("button", { className: "quiet", onclick: choose }, base || served.base);
    const row = make("tr", {}, make("td", {}, button), make("td", { colSpan: 4, className: "soft" }, "Planning …"));
    table.append(row);
    const cells = await baseCells(base, signal);
    if (signal.aborted) return row.remove();
    row.lastChild.replaceWith(...cells);
  }
}

async function baseCells(base, signal) {
  try {
    const answer = await studio(draftPath("/plan"), { body: { ...chosenMethod(), base, keep: false }, signal });
    const [plan] = answer.plans;
    const memory = `${bytes(plan.needed_memory_bytes)} of ${bytes(answer.memory_bytes)}`;
    const time = duration(plan.run_seconds);
    const texts = [large(plan.trainable_parameters), memory, time, FITS[plan.fits]];
    return texts.map((text) => make("td", {}, text));
  } catch (fault) {
    return [make("td", { colSpan: 4, className: "soft" }, said(fault) ?? "")];
  }
}

function beginBases() {
  byId("method-base").addEventListener("change", chooseBase);
  byId("bases-compare").addEventListener("click", compareBases);
}
beginBases();
