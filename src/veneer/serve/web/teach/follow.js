// Follows what the server does for long: a job, an evaluation, an export.

const RETRY_MILLISECONDS = 1500;

/**
 * Shows the events of a stream until nothing more will come. Opens the stream again when the
 * connection is lost. Throws Refused.
 * path: returns the stream's address. show: shows an event; returns whether more will come.
 * signal: ends it.
 */
async function followEvents(path, show, signal) {
  let isLost = false; // the connection
  while (!signal.aborted) {
    try {
      let isOpen = true;
      for await (const event of events(await request(`/studio/api${path()}`, { signal }))) {
        if (isLost) showFault(null);
        isLost = false;
        if (event.fault) throw new Refused(404, event.fault);
        isOpen = show(event);
      }
      if (!isOpen) return;
    } catch (fault) {
      if (signal.aborted) return;
      if (fault instanceof Refused) throw fault;
      isLost = true;
      showFault(faultText(fault));
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
  }
}

/** Says what an evaluation or an export does. doing: such as "Measuring". */
function workStatus({ state, seconds, error }, doing) {
  if (state === "waiting") return `${doing}: other work runs first.`;
  if (state === "running") return `${doing} … ${duration(seconds)}`;
  return state === "stopped" ? "Stopped." : (error ?? "");
}
