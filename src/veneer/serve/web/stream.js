// Streams one answer and measures its speed.

/** Yields the objects of an event stream, until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unfinished = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const received = (unfinished + value).split("\n\n");
    unfinished = received.pop();
    for (const event of received) {
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
 * first: seconds to the first token. rate: tokens a second from then on.
 * tokens, prompt, cached: tokens of the answer, of the prompt, and of the prompt in the cache.
 */
const emptyResult = () => ({
  text: "",
  reason: null,
  first: null,
  rate: null,
  tokens: 0,
  prompt: null,
  cached: null,
});

/**
 * Asks a model, and shows the result after each piece. Returns the whole result.
 * Throws Refused, AbortError.
 */
async function streamAnswer(body, show, signal) {
  const start = performance.now();
  const result = emptyResult();
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("/v1/chat/completions", { body: streamed, signal });
  for await (const event of events(response)) {
    if (event.error) throw new Refused(200, event.error.message);
    addEvent(result, event, (performance.now() - start) / 1000);
    show(result);
  }
  return result;
}

/** Adds a piece of an answer to its result. seconds: since the request */
function addEvent(result, event, seconds) {
  result.first ??= seconds;
  for (const choice of event.choices) {
    result.text += choice.delta.content ?? "";
    result.reason = choice.finish_reason ?? result.reason;
    result.tokens += choice.delta.content ? 1 : 0; // until the usage says it
  }
  if (event.usage) {
    result.tokens = event.usage.completion_tokens;
    result.prompt = event.usage.prompt_tokens;
    result.cached = event.usage.prompt_tokens_details.cached_tokens;
  }
  const since = seconds - result.first;
  if (since > 0.05 && result.tokens > 1) result.rate = (result.tokens - 1) / since;
}

const ENDS = { length: "stopped at the token limit", stop: "ended", tool_calls: "calls a tool" };

function figuresOf({ rate, first, cached, prompt, tokens, reason }) {
  const parts = [];
  if (rate !== null) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (first !== null) parts.push(`first after ${Math.round(first * 1000)} ms`);
  if (cached !== null) parts.push(`${cached} of ${prompt} prompt tokens cached`);
  if (reason) parts.push(`${tokens} tokens, ${ENDS[reason] ?? reason}`);
  return parts.join(" · ");
}
