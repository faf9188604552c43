// Finds the words of an answer that differ from the base's: those outside the longest common
// sequence of words.

const MOST_PAIRS = 4_000_000;
const wordsOf = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];

/** Returns [kind, text] in order. kind: same, more (only in `text`), less (only in `base`). */
function differences(base, text) {
  return readable(shared(base, text));
}

/** Joins changes with fewer than two common words between them: these are the same by chance. */
function readable(parts) {
  const joined = [];
  let [less, more] = ["", ""];
  const close = () => {
    if (less) joined.push(["less", less]);
    if (more) joined.push(["more", more]);
    [less, more] = ["", ""];
  };
  parts.forEach(([kind, words], place) => {
    const between = place > 0 && place < parts.length - 1;
    if (kind === "less") less += words;
    else if (kind === "more") more += words;
    else if (between && (words.match(/[\p{L}\p{N}_]+/gu) ?? []).length < 2) {
      less += words;
      more += words;
    } else {
      close();
      joined.push(["same", words]);
    }
  });
  close();
  return joined;
}

/** Returns [kind, text] in order: what both begin and end with is the same in any case. */
function shared(base, text) {
  let [ours, theirs] = [wordsOf(text), wordsOf(base)];
  const parts = [];
  let start = 0;
  while (start < ours.length && start < theirs.length && ours[start] === theirs[start]) start++;
  let end = 0;
  const most = Math.min(ours.length, theirs.length) - start;
  while (end < most && ours.at(-1 - end) === theirs.at(-1 - end)) end++;
  const add = (kind, word) => {
    if (parts.at(-1)?.[0] === kind) parts.at(-1)[1] += word;
    else parts.push([kind, word]);
  };
  const tail = ours.slice(ours.length - end);
  ours.slice(0, start).forEach((word) => add("same", word));
  [ours, theirs] = [ours.slice(start, ours.length - end), theirs.slice(start, theirs.length - end)];
  for (const [kind, word] of middle(theirs, ours)) add(kind, word);
  tail.forEach((word) => add("same", word));
  return parts;
}

/** Yields the words of both texts in order, by their longest common sequence. */
function* middle(theirs, ours) {
  const [n, m] = [theirs.length, ours.length];
  if (n * m > MOST_PAIRS) {
    for (const word of theirs) yield ["less", word];
    for (const word of ours) yield ["more", word];
    return;
  }
  // longest[i][j]: length of the longest common sequence of the words from i and from j on
  const longest = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      longest[i][j] =
        theirs[i] === ours[j]
          ? longest[i + 1][j + 1] + 1
          : Math.max(longest[i + 1][j], longest[i][j + 1]);
  let [i, j] = [0, 0];
  while (i < n || j < m) {
    if (i < n && j < m && theirs[i] === ours[j]) {
      yield ["same", ours[j]];
      i++, j++;
    } else if (j >= m || (i < n && longest[i + 1][j] >= longest[i][j + 1])) {
      yield ["less", theirs[i++]];
    } else yield ["more", ours[j++]];
  }
}

const TAGS = { same: "span", more: "ins", less: "del" };
/** Makes an element for each word of an answer, and of the base's that is missing in it. */
const markedDifferences = (base, text) =>
  differences(base, text).map(([kind, word]) => make(TAGS[kind], {}, word));
