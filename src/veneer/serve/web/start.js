// Tabs, the API key, and the list of models.

const TABS = [...document.querySelectorAll("[role=tab]")].map((tab) => tab.getAttribute("aria-controls"));
Object.assign(whenOpened, { library: openLibrary, runs: openRuns });

function openTab(name) {
  for (const each of TABS) {
    byId(each).hidden = each !== name;
    byId(`tab-${each}`).ariaSelected = String(each === name);
    byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  byId("columns").hidden = name !== "ask" && name !== "table";
  history.replaceState(null, "", `#${name}`);
  if (served.base) whenOpened[name]?.();
  if (name === "ask" && !touches()) byId("question").focus();
}

function beginTabs() {
  TABS.forEach((name, number) => {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => openTab(name));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = TABS.at((number + by) % TABS.length);
      openTab(next);
      byId(`tab-${next}`).focus();
    });
  });
}

function beginKey() {
  const [dialog, key] = [byId("key-dialog"), byId("key")];
  const use = (event) => {
    event.preventDefault();
    session.key = key.value.trim();
    sessionStorage.setItem("key", session.key);
    dialog.close();
    begin();
  };
  byId("key-button").addEventListener("click", () => dialog.showModal());
  byId("key-close").addEventListener("click", () => dialog.close());
  byId("key-form").addEventListener("submit", use);
}

async function begin() {
  const wanted = location.hash.slice(1);
  const went = await told(byId("columns"), loadModels);
  if (went && !chosen.length && served.adapters.length) addColumn(served.adapters[0].id);
  openTab(TABS.includes(wanted) ? wanted : TABS[0]);
}

document.addEventListener("keydown", (event) => {
  const within = event.target.closest("input, textarea, dialog");
  if (event.key === "Escape" && !event.target.closest("dialog")) stop();
  else if (event.key === "/" && !within && !byId("ask").hidden) {
    event.preventDefault();
    byId("question").focus();
  }
});
beginTabs();
beginKey();
beginAsk();
beginCode();
beginTable();
begin();
