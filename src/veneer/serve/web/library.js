// The Library tab: each adapter's facts, its lineage, and how much it changes each layer.

const TIERS = { ready: "in memory", loading: "on its way", failed: "broken", disk: "on disk" };
const PROOFS = {
  fingerprint: "this one, by its fingerprint",
  stated: "stated when it was added",
  unverified: "unverified",
};
let adapterShown = null;

/** Shows an error. Returns whether it succeeded. */
async function told(place, work) {
  try {
    await work();
    return true;
  } catch (fault) {
    place.replaceChildren(make("p", { className: "bad", role: "alert" }, said(fault) ?? ""));
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
  await told(place, async () => {
    await loadModels();
    const { data } = await read("/v1/adapters");
    const tiers = Object.fromEntries(data.map((each) => [each.version, each]));
    showAdapters(tiers);
    if (adapterShown === null && served.adapters.length) await openAdapter(served.adapters[0].id);
  });
}

function showAdapters(tiers) {
  const wanted = byId("filter").value.trim().toLowerCase();
  const found = served.adapters.filter((card) => `${card.id} ${card.method}`.toLowerCase().includes(wanted));
  const item = (card) => {
    const held = tiers[card.version];
    const where = held ? `${TIERS[held.tier]}${held.pinned ? ", pinned" : ""}` : "on disk";
    const current = card.id === adapterShown;
    const open = make("button", { ariaCurrent: String(current), onclick: () => openAdapter(card.id) }, card.id);
    open.append(make("small", {}, `${card.root} · ${card.method} · ${bytes(card.bytes)} · ${where}`));
    return make("li", {}, open);
  };
  const none = served.adapters.length ? "No adapter has this name." : "The library is empty. veneer train --name NAME adds an adapter.";
  const list = byId("adapters-list");
  list.replaceChildren();
  if (found.length) showList(list, found, item);
  else list.append(make("li", { className: "soft" }, none));
  byId("filter").oninput = () => showAdapters(tiers);
}

async function openAdapter(name) {
  adapterShown = name;
  for (const each of byId("adapters-list").querySelectorAll("button"))
    each.ariaCurrent = String(each.firstChild.textContent === name);
  const place = byId("adapter");
  await told(place, async () => {
    const facts = await read(`/v1/adapters/${encodeURIComponent(name)}`);
    if (adapterShown === name) place.replaceChildren(...adapterParts(name, facts));
  });
}

function adapterParts(name, facts) {
  const list = (pairs) =>
    make("dl", {}, ...pairs.flatMap(([term, what]) => [make("dt", {}, term), make("dd", {}, String(what))]));
  const add = () => {
    addColumn(name);
    openTab("ask");
  };
  const known = [
    ["version", `${facts.reference}, ${facts.added.replace("T", " ").replace("Z", " UTC")}`],
    ["method", facts.rank === null ? facts.method : `${facts.method}, rank ${facts.rank}`],
    ["size", `${count(facts.parameters)} parameters, ${bytes(facts.bytes)}`],
    ["base", PROOFS[facts.base_proof]],
    ["content", facts.version.slice(0, 12)],
  ];
  if (facts.tags.length) known.splice(1, 0, ["tags", facts.tags.join(", ")]);
  if (facts.note) known.splice(1, 0, ["note", facts.note]);
  const metrics = Object.entries(facts.metrics);
  const named = (each) => each.reference ?? `${each.version.slice(0, 12)} (not in the library)`;
  const from = facts.lineage.map((each) => ["from", named(each)]);
  const parents = facts.parents.map((each) => [`× ${figure(each.weight)}`, named(each)]);
  const alone = facts.alone.map((each) => [each.module, figure(each.norm)]);
  const rest = `${count(facts.others)} tensors that are no low-rank update`;
  const section = (title, ...what) => [make("h3", {}, title), ...what];
  return [
    make("h2", {}, name),
    make("div", { className: "actions" }, make("button", { onclick: add }, "Ask it")),
    list(known),
    ...(metrics.length ? section("Metrics", list(metrics.map(([key, value]) => [key, figure(value)]))) : []),
    ...(from.length + parents.length ? section("Lineage", list([...from, ...parents])) : []),
    ...(facts.layers.length ? section("Size of the update by layer, ‖ΔW‖", picture(facts.layers)) : []),
    ...(facts.layers.length && served.adapters.length > 1 ? angles(name) : []),
    ...(alone.length ? section("Outside the layers", list(alone)) : []),
    ...(facts.others ? [make("p", { className: "soft" }, rest)] : []),
  ];
}

/** Shows by layer whether another adapter's update has the same direction. */
function angles(name) {
  const place = make("div");
  const other = make("input", { type: "text", list: "names", placeholder: "another adapter", spellcheck: false });
  other.setAttribute("aria-label", "Another adapter");
  other.addEventListener("change", () =>
    told(place, async () => {
      const against = encodeURIComponent(other.value.trim());
      const found = await read(`/v1/adapters/${encodeURIComponent(name)}?against=${against}`);
      place.replaceChildren(...anglesShown(found));
    }),
  );
  return [make("h3", {}, "Angle between the updates"), make("div", { className: "actions" }, other), place];
}

function anglesShown(found) {
  const none = "No angle: the adapters change no weight in common.";
  if (found.cosine === null) return [make("p", { className: "soft" }, none)];
  const values = Object.entries(found.by_layer).filter(([, value]) => value !== null);
  const bars = values.map(([layer, value], place) => {
    const height = Math.max(0.6, Math.abs(value) * 17);
    const look = value < 0 ? "less" : "more";
    const box = { x: place * 10 + 1, y: value < 0 ? 17 : 17 - height, width: 8, height, class: look };
    const bar = draw("rect", box);
    bar.append(draw("title", {}, `${layer}: ${figure(value)}`));
    return bar;
  });
  const zero = draw("line", { class: "grid", x1: 0, x2: values.length * 10, y1: 17, y2: 17 });
  const viewBox = `0 0 ${values.length * 10} 34`;
  const box = { viewBox, preserveAspectRatio: "none", role: "img", "aria-label": "cosine by layer" };
  const degrees = Math.round((Math.acos(found.cosine) * 180) / Math.PI);
  const parts = [make("span", {}, "cosine"), draw("svg", box, zero, ...bars), make("span", {}, "−1 to 1")];
  return [
    make("div", { className: "picture" }, ...parts),
    make("p", { className: "soft" }, `${figure(found.cosine)} in all, ${degrees}° to ${found.against}`),
  ];
}

/** Draws a row for each kind of module, with a bar for each layer, on one scale. */
function picture(kinds) {
  const all = kinds.flatMap((kind) => Object.values(kind.norms));
  const deepest = Math.max(...kinds.flatMap((kind) => Object.keys(kind.norms).map(Number)));
  const highest = Math.max(...all) || 1;
  const rows = kinds.flatMap(({ kind, norms }) => {
    const bars = Object.entries(norms).map(([layer, norm]) => {
      const height = Math.max(0.6, (34 * norm) / highest);
      const bar = draw("rect", { x: Number(layer) * 10 + 1, y: 34 - height, width: 8, height, rx: 1 });
      bar.append(draw("title", {}, `layer ${layer}: ${figure(norm)}`));
      return bar;
    });
    const [low, high] = [Math.min(...Object.values(norms)), Math.max(...Object.values(norms))];
    const viewBox = `0 0 ${(deepest + 1) * 10} 34`;
    const box = { viewBox, preserveAspectRatio: "none", role: "img", "aria-label": kind };
    const range = low === high ? figure(low) : `${figure(low)} to ${figure(high)}`;
    return [make("span", {}, kind), draw("svg", box, ...bars), make("span", {}, range)];
  });
  return make("div", { className: "picture" }, ...rows);
}
