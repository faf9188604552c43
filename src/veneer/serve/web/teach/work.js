// Work that the server does in a process of its own: an evaluation, an export. The page polls it until it ends.

const LOOK_EVERY = 1000; // milliseconds
const WORKING = ["waiting", "running"];

/**
 * Polls the state of some work while it waits or runs, and shows it. A failed poll is repeated.
 * shown: is called with each state. signal: ends it.
 */
async function followWork(path, shown, signal) {
  while (!signal.aborted) {
    try {
      const state = await studio(path, { signal });
      shown(state);
      if (!WORKING.includes(state.state)) return;
    } catch (fault) {
      if (signal.aborted) return;
      if (fault instanceof Refused) throw fault;
    }
    await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY));
  }
}

/** Says what some work does. doing: such as "Measuring". */
function workSaid({ state, seconds, error }, doing) {
  if (state === "waiting") return `${doing}: other work runs first.`;
  if (state === "running") return `${doing} … ${duration(seconds)}`;
  return error ?? "";
}
