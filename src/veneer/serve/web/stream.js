// Streams one answer and measures its speed.

/** Yields the objects of an event stream, until [DONE]. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (held + value).split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Makes the body of a request. column: a name and a weight. */
function bodyOf(column, messages, settings) {
  const alone = column.weight === 1 || column.name === served.base;
  const model = alone ? { model: column.name } : { model: served.base, adapters: [{ ...column }] };
  return { ...model, messages, ...settings };
}

/**
 * Asks, and tells of every piece. Returns the answer: its text, why it ended, and figures.
 * first: seconds to the first token. rate: tokens a second from then on. Throws Refused, AbortError.
 */
async function answered(body, tell, signal) {
  const began = performance.now();
  const found = { text: "", reason: null, first: null, rate: null, tokens: 0, prompt: null, cached: null };
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("/v1/chat/completions", { body: asked, signal });
  let pieces = 0;
  for await (const event of events(response)) {
    if (event.error) throw new Refused(200, event.error.message);
    const now = performance.now();
    found.first ??= (now - began) / 1000;
    const since = (now - began) / 1000 - found.first;
    for (const choice of event.choices) {
      found.text += choice.delta.content ?? "";
      found.reason = choice.finish_reason ?? found.reason;
      pieces += choice.delta.content ? 1 : 0;
    }
    if (event.usage) {
      found.tokens = event.usage.completion_tokens;
      found.prompt = event.usage.prompt_tokens;
      found.cached = event.usage.prompt_tokens_details.cached_tokens;
    } else found.tokens = pieces;
    if (since > 0.05 && found.tokens > 1) found.rate = (found.tokens - 1) / since;
    tell(found);
  }
  return found;
}

const ENDS = { length: "cut at new tokens", stop: "ended", tool_calls: "calls a tool" };

function figuresOf(found) {
  const parts = [];
  if (found.rate !== null) parts.push(`${found.rate.toFixed(1)} tokens/s`);
  if (found.first !== null) parts.push(`first after ${Math.round(found.first * 1000)} ms`);
  if (found.cached !== null) parts.push(`${found.cached} of ${found.prompt} prompt tokens cached`);
  if (found.reason) parts.push(`${found.tokens} tokens, ${ENDS[found.reason] ?? found.reason}`);
  return parts.join(" · ");
}
