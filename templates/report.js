"use strict";
// Every text from the data goes through textContent: nothing in it is ever read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50, AROUND = 45, SHOWN = data.runs.length > 1 ? 3 : 5;
const control = (id) => document.getElementById(id);
const paragraphs = new Map();

// Places are in code points, a JavaScript string's are in UTF-16 units.
function characters(number) {
  if (!paragraphs.has(number)) paragraphs.set(number, Array.from(data.paragraphs[number]));
  return paragraphs.get(number);
}
const cut = (kase, start, end) => characters(kase.paragraph).slice(start, end).join("");
const answerText = (kase, answer) => answer.chosen < 0 ? "" : cut(kase, ...answer.nbest[answer.chosen].slice(0, 2));
const sureness = (kase) => kase.answers[0].chosen < 0 ? 0 : kase.answers[0].nbest[kase.answers[0].chosen][2];
const percent = (share) => share >= 0.9995 ? "100%" : share < 0.0005 ? "<0.1%" : (100 * share).toFixed(1) + "%";

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const orders = {
  dataset: null,
  surest: (a, b) => sureness(b) - sureness(a),
  unsure: (a, b) => sureness(a) - sureness(b),
  f1: (a, b) => a.answers[0].f1 - b.answers[0].f1,
  long: (a, b) => Math.max(...b.gold.map(([s, e]) => e - s)) - Math.max(...a.gold.map(([s, e]) => e - s)),
};

const ranks = {
  near: (rank) => rank >= 1 && rank < 5,
  far: (rank) => rank >= 5,
  none: (rank) => rank < 0,
};

function matching() {
  const outcome = control("outcome")?.value, error = control("error").value, asks = control("asks").value;
  const rank = control("rank").value, search = control("search").value.trim().toLowerCase();
  const found = data.cases.filter((kase) =>
    (!outcome || kase.outcome === outcome) &&
    (!error || kase.answers.some((answer) => answer.error === error)) &&
    (!asks || kase.asks === asks) &&
    (!rank || kase.answers.some((answer) => answer.error && ranks[rank](answer.rank))) &&
    (!search || kase.id === search || kase.question.toLowerCase().includes(search) ||
      data.paragraphs[kase.paragraph].toLowerCase().includes(search)));
  const order = orders[control("order").value];
  return order ? found.sort(order) : found;
}

// The passage as text and <mark>s: where spans overlap, a piece carries the marks of all of them.
function passage(kase, whole) {
  const text = characters(kase.paragraph);
  const spans = kase.gold.map(([start, end]) => ({ start, end, mark: "gold", tag: "gold" }));
  kase.answers.forEach((answer, run) => {
    if (answer.chosen < 0) return;
    const [start, end] = answer.nbest[answer.chosen];
    if (start < end) spans.push({ start, end, mark: "run-" + run, tag: data.runs.length > 1 ? data.runs[run] : "answer" });
  });
  const shown = whole ? [[0, text.length]] : excerpt(spans, text.length);
  const node = make("p", { class: "passage", lang: "zh-Hant" });
  for (const [first, last] of shown) {
    if (first > 0) node.append("… ");
    const inside = spans.flatMap(({ start, end }) => [start, end]).filter((place) => place > first && place < last);
    const edges = [...new Set([first, ...inside, last])].sort((a, b) => a - b);
    for (let i = 0; i + 1 < edges.length; i++) {
      const piece = text.slice(edges[i], edges[i + 1]).join("");
      const own = spans.filter(({ start, end }) => start <= edges[i] && edges[i + 1] <= end);
      if (!own.length) { node.append(piece); continue; }
      const mark = make("mark", { class: [...new Set(own.map((span) => span.mark))].join(" ") }, piece);
      const begun = [...new Set(own.filter(({ start }) => start === edges[i]).map((span) => span.tag))];
      if (begun.length) node.append(make("span", { class: "tag", "data-tag": begun.join(" + ") }));
      node.append(mark);
    }
  }
  if (shown.length && shown[shown.length - 1][1] < text.length) node.append(" …");
  return node;
}

function excerpt(spans, length) {
  const merged = [];
  for (const { start, end } of [...spans].sort((a, b) => a.start - b.start)) {
    const first = Math.max(0, start - AROUND), last = Math.min(length, end + AROUND), previous = merged.at(-1);
    if (previous && first <= previous[1] + 20) previous[1] = Math.max(previous[1], last);
    else merged.push([first, last]);
  }
  return merged;
}

function candidates(kase, answer, title) {
  const gold = new Set(kase.gold.map(([start, end]) => cut(kase, start, end).replaceAll(",", "")));
  const rows = answer.nbest.map(([start, end, probability], place) => {
    const text = cut(kase, start, end), right = gold.has(text.replaceAll(",", ""));
    const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("span", { style: "width:" + 100 * probability + "%" }));
    const notes = [place === answer.chosen ? "answer" : "", right ? "right" : ""].filter(Boolean).join(", ");
    return make("tr", { class: (right ? "is-right " : "") + (place === answer.chosen ? "is-answer" : "") },
      make("td", { class: "place" }, String(place + 1)),
      make("td", { class: "text" }, make("span", { lang: "zh-Hant" }, text || "(empty)"),
        ...(notes ? [make("span", { class: "mine" }, (right ? "✓ " : "") + notes)] : [])),
      make("td", { class: "probability" }, bar, make("span", { class: "figure" }, percent(probability))));
  });
  const body = make("tbody", {}, ...rows.slice(0, SHOWN));
  const node = make("div", { class: "nbest" },
    make("table", {}, make("caption", {}, title), body));
  if (!rows.length) node.append(make("p", { class: "meta" }, "no candidate"));
  if (rows.length > SHOWN) {
    const more = make("button", { type: "button", class: "link" }, `all ${rows.length}`);
    more.addEventListener("click", () => { body.append(...rows.slice(SHOWN)); more.remove(); });
    node.append(more);
  }
  return node;
}

function answerLine(term, mark, text) {
  return make("div", {}, make("dt", {}, make("mark", { class: mark }, term)),
    make("dd", { lang: "zh-Hant" }, text || "(empty)"));
}

function rankNote(answer) {
  if (!answer.error || answer.rank === 0) return "";
  return answer.rank < 0 ? "right answer not among the n best" : `right answer at place ${answer.rank + 1}`;
}

function show(kase) {
  const two = data.runs.length > 1, [mine] = kase.answers;
  const badges = make("p", { class: "badges" });
  if (two) badges.append(make("span", { class: "badge " + kase.outcome.replaceAll(" ", "-") }, kase.outcome));
  kase.answers.forEach((answer, run) => {
    if (answer.error) badges.append(make("span", { class: "badge" }, (two ? data.runs[run] + ": " : "") + answer.error));
  });
  const facts = [`question ${kase.id}`, kase.asks, two ? "" : `F1 ${mine.f1.toFixed(2)}`, two ? "" : rankNote(mine)];
  badges.append(make("span", { class: "meta" }, facts.filter(Boolean).join(" · ")));
  const gold = [...new Set(kase.gold.map(([start, end]) => cut(kase, start, end)))].join(" / ");
  const lines = make("dl", { class: "answers" }, answerLine("gold", "gold", gold));
  kase.answers.forEach((answer, run) =>
    lines.append(answerLine(two ? data.runs[run] : "answer", "run-" + run, answerText(kase, answer))));
  let text = passage(kase, false);
  const left = make("div", { class: "left" }, lines, text);
  if (text.textContent !== data.paragraphs[kase.paragraph]) {
    const toggle = make("button", { type: "button", class: "link", "aria-expanded": "false" }, "whole passage");
    toggle.addEventListener("click", () => {
      const whole = toggle.getAttribute("aria-expanded") === "false";
      const next = passage(kase, whole);
      text.replaceWith(next);
      text = next;
      toggle.setAttribute("aria-expanded", String(whole));
      toggle.textContent = whole ? "excerpt" : "whole passage";
    });
    left.append(toggle);
  }
  const right = make("div", { class: "right-side" });
  kase.answers.forEach((answer, run) => right.append(candidates(kase, answer, two ? data.runs[run] : "n best")));
  return make("article", { class: "case" }, badges, make("h3", { lang: "zh-Hant" }, kase.question),
    make("div", { class: "body" }, left, right));
}

let found = [], shown = 0;

function more() {
  const next = found.slice(shown, shown + PAGE);
  control("cases").append(...next.map(show));
  shown += next.length;
  control("more").hidden = shown >= found.length;
  control("more").textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
  const all = data.cases.length, few = shown < found.length ? `, the first ${shown} shown` : "";
  const what = data.runs.length > 1 ? "questions that a run answered wrongly" : "wrong answers";
  control("count").textContent = found.length === all ? `${all.toLocaleString("en")} ${what}${few}`
    : `${found.length.toLocaleString("en")} of ${all.toLocaleString("en")} ${what}${few}`;
}

function refresh() {
  control("cases").replaceChildren();
  found = matching();
  shown = 0;
  more();
}

const kinds = new Map();
for (const kase of data.cases) kinds.set(kase.asks, (kinds.get(kase.asks) || 0) + 1);
for (const [kind, count] of [...kinds].sort((a, b) => b[1] - a[1]))
  control("asks").append(make("option", { value: kind }, `${kind} (${count})`));

let typing;
control("filters").addEventListener("change", refresh);
control("filters").addEventListener("submit", (event) => event.preventDefault());
control("filters").addEventListener("reset", () => setTimeout(refresh));
control("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(refresh, 150); });
control("more").addEventListener("click", () => {
  const before = shown;
  more();
  const first = control("cases").children[before];
  first.tabIndex = -1;
  first.focus({ preventScroll: true });  // a keyboard goes on where the new ones begin
});
refresh();
