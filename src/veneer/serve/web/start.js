// Tabs, the API key, and the list of models.

const tabButtons = [...document.querySelectorAll("[role=tab]")];
const TABS = tabButtons.map((button) => button.getAttribute("aria-controls"));
Object.assign(whenOpened, { library: openLibrary, runs: openRuns });

function openTab(name) {
  for (const tab of TABS) {
    const isOpen = tab === name;
    byId(tab).hidden = !isOpen;
    byId(`tab-${tab}`).ariaSelected = String(isOpen);
    byId(`tab-${tab}`).tabIndex = isOpen ? 0 : -1;
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
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = TABS.at((number + step) % TABS.length);
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
  const isLoaded = await workSafely(byId("columns"), loadModels);
  if (isLoaded && !chosen.length && served.adapters.length) addColumn(served.adapters[0].id);
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
