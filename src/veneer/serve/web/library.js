// The Library tab: each adapter's facts, its lineage, and how much it changes each layer.

const TIERS = { ready: "in memory", loading: "on its way", failed: "broken", disk: "on disk" };
const PROOFS = {
  fingerprint: "this base",
  stated: "stated when it was added",
  unverified: "unverified",
};
/** Name of the adapter that is shown. */
let shownAdapter = null;

/** Does some work, and shows its error in a place. Returns whether it succeeded. */
async function workSafely(place, work) {
  try {
    await work();
    return true;
  } catch (fault) {
    place.replaceChildren(make("p", { className: "bad", role: "alert" }, faultText(fault) ?? ""));
    return false;
  }
}

async function loadModels() {
  const { data } = await read("/v1/models");
  const [base, ...adapters] = data;
  [served.base, served.adapters] = [base.id, adapters];
  byId("base").textContent = base.id;
  byId("names").replaceChildren(...adapters.map((card) => make("option", { value: card.id })));
  showColumns();
}

async function openLibrary() {
  const place = byId("adapters-list");
  await workSafely(place, async () => {
    await loadModels();
    const { data } = await read("/v1/adapters");
    showAdapters(Object.fromEntries(data.map((resident) => [resident.version, resident])));
    if (shownAdapter === null && served.adapters.length) await openAdapter(served.adapters[0].id);
  });
}

/** Lists the adapters that the filter matches. residents: those in memory, by version */
function showAdapters(residents) {
  const wanted = byId("filter").value.trim().toLowerCase();
  const isWanted = (card) => `${card.id} ${card.method}`.toLowerCase().includes(wanted);
  const cards = served.adapters.filter(isWanted);
  const list = byId("adapters-list");
  list.replaceChildren();
  if (cards.length) showList(list, cards, (card) => adapterEntry(card, residents[card.version]));
  else list.append(make("li", { className: "soft" }, emptyLibraryText()));
  byId("filter").oninput = () => showAdapters(residents);
}

const emptyLibraryText = () =>
  served.adapters.length
    ? "No adapter has this name."
    : "The library is empty. veneer train --name NAME adds an adapter.";

function adapterEntry(card, resident) {
  const pinned = resident?.pinned ? ", pinned" : "";
  const where = resident ? `${TIERS[resident.tier]}${pinned}` : "on disk";
  const ariaCurrent = String(card.id === shownAdapter);
  const open = make("button", { ariaCurrent, onclick: () => openAdapter(card.id) }, card.id);
  const facts = [card.root, card.method, bytes(card.bytes), where];
  open.append(make("small", {}, facts.join(" · ")));
  return make("li", {}, open);
}

async function openAdapter(name) {
  shownAdapter = name;
  for (const button of byId("adapters-list").querySelectorAll("button"))
    button.ariaCurrent = String(button.firstChild.textContent === name);
  const place = byId("adapter");
  await workSafely(place, async () => {
    const facts = await read(`/v1/adapters/${encodeURIComponent(name)}`);
    if (shownAdapter === name) place.replaceChildren(...adapterParts(name, facts));
  });
}

/** Makes a list of terms and their values. */
const factList = (pairs) =>
  make("dl", {}, ...pairs.flatMap(([term, value]) => [
    make("dt", {}, term),
    make("dd", {}, String(value)),
  ]));

/** Returns a title and what follows, or nothing without facts. */
const factSection = (title, pairs) =>
  pairs.length ? [make("h3", {}, title), factList(pairs)] : [];

/** Returns the parts that show an adapter. */
function adapterParts(name, facts) {
  const ask = () => {
    addColumn(name);
    openTab("ask");
  };
  const metrics = Object.entries(facts.metrics).map(([key, value]) => [key, figure(value)]);
  const outside = facts.alone.map(({ module, norm }) => [module, figure(norm)]);
  const othersText = `${count(facts.others)} tensors that are no low-rank update`;
  const updates = facts.layers.length
    ? [make("h3", {}, "Size of the update by layer, ‖ΔW‖"), normPicture(facts.layers)]
    : [];
  return [
    make("h2", {}, name),
    make("div", { className: "actions" }, make("button", { onclick: ask }, "Ask it")),
    factList(mainFacts(facts)),
    ...factSection("Metrics", metrics),
    ...factSection("Lineage", lineageOf(facts)),
    ...updates,
    ...(facts.layers.length && served.adapters.length > 1 ? angleSection(name) : []),
    ...factSection("Outside the layers", outside),
    ...(facts.others ? [make("p", { className: "soft" }, othersText)] : []),
  ];
}

function mainFacts(facts) {
  const added = facts.added.replace("T", " ").replace("Z", " UTC");
  const pairs = [
    ["version", `${facts.reference}, ${added}`],
    ["note", facts.note],
    ["tags", facts.tags.join(", ")],
    ["method", facts.rank === null ? facts.method : `${facts.method}, rank ${facts.rank}`],
    ["size", `${count(facts.parameters)} parameters, ${bytes(facts.bytes)}`],
    ["base", PROOFS[facts.base_proof]],
    ["content", facts.version.slice(0, 12)],
  ];
  return pairs.filter(([, value]) => value);
}

/** Returns the adapters from which this one was made. */
function lineageOf(facts) {
  const nameOf = ({ reference, version }) =>
    reference ?? `${version.slice(0, 12)} (not in the library)`;
  const ancestors = facts.lineage.map((adapter) => ["from", nameOf(adapter)]);
  const parents = facts.parents.map((adapter) => [`× ${figure(adapter.weight)}`, nameOf(adapter)]);
  return [...ancestors, ...parents];
}

/** Shows by layer whether another adapter's update has the same direction. */
function angleSection(name) {
  const place = make("div");
  const placeholder = "another adapter";
  const field = make("input", { type: "text", list: "names", placeholder, spellcheck: false });
  field.setAttribute("aria-label", "Another adapter");
  const compare = async () => {
    const other = encodeURIComponent(field.value.trim());
    const angles = await read(`/v1/adapters/${encodeURIComponent(name)}?against=${other}`);
    place.replaceChildren(...angleParts(angles));
  };
  field.addEventListener("change", () => workSafely(place, compare));
  const title = make("h3", {}, "Angle between the updates");
  return [title, make("div", { className: "actions" }, field), place];
}

/** Returns a bar for each layer, up for the same direction and down for the opposite one. */
function angleParts({ cosine, by_layer: byLayer, against }) {
  const none = "No angle: the adapters change no weight in common.";
  if (cosine === null) return [make("p", { className: "soft" }, none)];
  const values = Object.entries(byLayer).filter(([, value]) => value !== null);
  const bars = values.map(([layer, value], position) => {
    const height = Math.max(0.6, Math.abs(value) * 17);
    const y = value < 0 ? 17 : 17 - height;
    const look = value < 0 ? "less" : "more";
    return bar({ x: position * 10 + 1, y, height, class: look }, `${layer}: ${figure(value)}`);
  });
  const width = values.length * 10;
  const zero = draw("line", { class: "grid", x1: 0, x2: width, y1: 17, y2: 17 });
  const picture = barPicture(width, "cosine by layer", [zero, ...bars]);
  const degrees = Math.round((Math.acos(cosine) * 180) / Math.PI);
  const cells = [make("span", {}, "cosine"), picture, make("span", {}, "−1 to 1")];
  const text = `${figure(cosine)} in all, ${degrees}° to ${against}`;
  return [make("div", { className: "picture" }, ...cells), make("p", { className: "soft" }, text)];
}

/** Draws a bar with a text that shows under the mouse. */
const bar = (box, title) => draw("rect", { width: 8, ...box }, draw("title", {}, title));

const barPicture = (width, label, parts) =>
  draw(
    "svg",
    {
      viewBox: `0 0 ${width} 34`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": label,
    },
    ...parts,
  );

/** Draws a row for each kind of module, with a bar for each layer, on one scale. */
function normPicture(kinds) {
  const norms = kinds.flatMap((kind) => Object.values(kind.norms));
  const layers = kinds.flatMap((kind) => Object.keys(kind.norms).map(Number));
  const width = (Math.max(...layers) + 1) * 10;
  const highest = Math.max(...norms) || 1;
  const rows = kinds.flatMap((kind) => normRow(kind, highest, width));
  return make("div", { className: "picture" }, ...rows);
}

function normRow({ kind, norms }, highest, width) {
  const bars = Object.entries(norms).map(([layer, norm]) => {
    const height = Math.max(0.6, (34 * norm) / highest);
    const box = { x: Number(layer) * 10 + 1, y: 34 - height, height, rx: 1 };
    return bar(box, `layer ${layer}: ${figure(norm)}`);
  });
  const [low, high] = [Math.min(...Object.values(norms)), Math.max(...Object.values(norms))];
  const range = low === high ? figure(low) : `${figure(low)} to ${figure(high)}`;
  return [make("span", {}, kind), barPicture(width, kind, bars), make("span", {}, range)];
}
