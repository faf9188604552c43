// Shared by all parts of the page: elements, requests, saving files.
// Texts are set as text, never as HTML.

const byId = (id) => document.getElementById(id);

/**
 * Makes an element. settings: properties and attributes; `on...` adds a listener.
 * Children that are null are left out.
 */
function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Makes an element of a drawing. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** By the name of a tab: called when it is opened. */
const whenOpened = {};
/** The served models: the base's name, and a card of each adapter. */
const served = { base: "", adapters: [] };
const session = { key: sessionStorage.getItem("key") ?? "" };

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Sends a request. body: sent as JSON; file: a Blob that is sent as it is. Throws Refused. */
async function request(path, { body, file, signal } = {}) {
  const headers = {};
  if (session.key) headers.authorization = `Bearer ${session.key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  if (file !== undefined) headers["content-type"] = "application/octet-stream";
  const content = file ?? (body === undefined ? undefined : JSON.stringify(body));
  const post = content === undefined ? {} : { method: "POST", body: content };
  const response = await fetch(path, { headers, signal, ...post });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  const refusal = await response.json().catch(() => null);
  const status = `${response.status} ${response.statusText}`;
  throw new Refused(response.status, refusal?.error?.message ?? status);
}

function askForKey() {
  byId("key-said").textContent = session.key ? "This key is not one of the server's keys." : "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal(); // once for several requests
}

const read = async (path, settings) => (await request(path, settings)).json();

/** Returns the message of an error; null if the user stopped the request. */
function faultText(fault) {
  if (fault.name === "AbortError") return null;
  return fault instanceof Refused ? fault.message : `The server does not answer: ${fault.message}`;
}

const save = (name, type, text) => saveBlob(name, new Blob([text], { type }));

function saveBlob(name, blob) {
  const address = URL.createObjectURL(blob);
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/**
 * Appends items to a list in pages: a button adds the next ones.
 * entryOf: makes an item's element. wrap: makes the place of the button.
 */
function showPaged(list, items, entryOf, most, wrap = (button) => button) {
  const rest = [...items];
  const add = () => {
    place.before(...rest.splice(0, most).map(entryOf));
    more.textContent = `${count(rest.length)} more`;
    if (!rest.length) place.remove();
  };
  const more = make("button", { className: "quiet", onclick: add });
  const place = wrap(more);
  list.append(place);
  add();
  return list;
}

const LISTED = 50;
const showList = (list, items, entryOf) =>
  showPaged(list, items, entryOf, LISTED, (button) => make("li", {}, button));

const touches = () => matchMedia("(pointer: coarse)").matches;
const figure = (value) => (value === null ? "–" : String(Number(Number(value).toPrecision(4))));
const count = (value) => Number(value).toLocaleString("en");

/** Writes a number with its noun: 1 step, 2 steps. */
const countOf = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

function bytes(value) {
  if (value < 1e6) return `${Math.round(value / 1e3)} kB`;
  if (value < 1e9) return `${(value / 1e6).toFixed(1)} MB`;
  return `${(value / 1e9).toFixed(2)} GB`;
}

/** Units of time with their seconds, the largest first. */
const TIME_UNITS = [
  [86400, "days"],
  [3600, "hours"],
  [60, "minutes"],
  [1, "seconds"],
];

/** Writes an age in the largest unit of which there are at least two. */
function ago(seconds) {
  const [unit, name] = TIME_UNITS.find(([size]) => seconds >= 2 * size) ?? TIME_UNITS.at(-1);
  return `${Math.max(0, Math.round(seconds / unit))} ${name} ago`;
}
