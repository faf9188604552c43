// Writes a request as code: curl, or Python with OpenAI's client.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curlOf(body, path = "/v1/chat/completions") {
  const address = `${location.origin}${path}`;
  const lines = [`curl ${address}`, "-H 'content-type: application/json'"];
  if (session.key) lines.push('-H "authorization: Bearer $VENEER_API_KEY"');
  return [...lines, `-d ${quoted(JSON.stringify(body, null, 1))}`].join(" \\\n  ");
}

/** Writes JSON as a Python literal. */
function literal(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = `${indent}    `;
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, inner))
    : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${literal(item, inner)}`);
  if (!items.length) return open + close;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

function pythonOf(body) {
  const { adapters, ...parameters } = body; // OpenAI's client has no parameter of that name
  const fields = Object.entries(parameters).map(
    ([name, value]) => `    ${name}=${literal(value, "    ")},`,
  );
  if (adapters) fields.push(`    extra_body=${literal({ adapters }, "    ")},`);
  return [
    ...(session.key ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `key = ${session.key ? 'os.environ["VENEER_API_KEY"]' : '"none"'}`,
    `client = OpenAI(base_url="${location.origin}/v1", api_key=key)`,
    "answer = client.chat.completions.create(",
    ...fields,
    ")",
    "print(answer.choices[0].message.content)",
    "",
  ].join("\n");
}

/** Writes a request as Python without a client of this API. */
function pythonRequestOf(body, path) {
  const headers = ['    "content-type": "application/json",'];
  if (session.key) headers.push('    "authorization": f"Bearer {os.environ[\'VENEER_API_KEY\']}",');
  return [
    "import json",
    ...(session.key ? ["import os"] : []),
    "from urllib.request import Request, urlopen",
    "",
    `body = ${literal(body)}`,
    "headers = {",
    ...headers,
    "}",
    `request = Request("${location.origin}${path}", json.dumps(body).encode(), headers)`,
    'print(json.load(urlopen(request))["data"][0])',
    "",
  ].join("\n");
}

function showCode(text) {
  byId("code").textContent = text;
  byId("code-copy").textContent = "Copy";
  byId("code-dialog").showModal();
}

function beginCode() {
  byId("code-close").addEventListener("click", () => byId("code-dialog").close());
  byId("code-copy").addEventListener("click", async () => {
    const code = byId("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      byId("code-copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // without TLS there is no clipboard: copy by hand
    }
  });
}
