// Elements and text. Whatever comes from a corpus goes through textContent only.

const NOT_SEEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\p{Cn}]/u;
const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥" };

// el("p.soft", {title: "..."}, child, "text", ...): children are nodes or text.
function el(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// What cannot be seen, as something that can: a sign, or its number.
function visible(text) {
  const parts = [];
  let plain = "";
  for (const one of text) {
    if (!NOT_SEEN.test(one)) {
      plain += one;
      continue;
    }
    if (plain) parts.push(plain);
    plain = "";
    const code = one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(el("span.sign", {}, SIGNS[one] ?? `U+${code}`));
  }
  if (plain) parts.push(plain);
  return parts;
}

// A token on its own, as in a table: its spaces are drawn, and it cannot change the
// direction of what stands beside it.
function chip(text) {
  const parts = visible(text).map((part) =>
    typeof part === "string" ? part.replaceAll(" ", "␣") : part
  );
  return el("bdi.chip", {}, ...(parts.length ? parts : ["(empty)"]));
}

function plainly(text) {
  return visible(text)
    .map((part) => (typeof part === "string" ? part : part.textContent))
    .join("");
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(digits - 1);
  return Number(value.toPrecision(digits)).toLocaleString("en-US", {
    maximumSignificantDigits: digits,
  });
}

function percent(share) {
  if (share === 0) return "0 %";
  return share < 1e-4 ? `${(100 * share).toExponential(1)} %` : `${number(100 * share)} %`;
}

// One token of a sequence: coloured by its activation, with the number on hover.
function token(text, value, { most, effect = null, peak = false, label = "" }) {
  const node = el(`bdi.t${peak ? ".peak" : ""}`, {}, ...visible(text));
  const known = value !== null && value !== undefined;
  shade(node, known ? value : 0, most);
  const words = [known ? `activation ${number(value, 4)}` : "not counted"];
  if (effect !== null) {
    words.push(`loss without it ${effect > 0 ? "+" : ""}${number(effect)} nats`);
    node.style.setProperty("--e", Math.min(Math.abs(effect), 1).toFixed(3));
    node.classList.add(effect > 0 ? "helps" : "hurts");
  }
  node.tip = `${plainly(text)}\n${label || words.join("\n")}`;
  return node;
}

function shade(node, value, most) {
  const strength = most ? Math.min(Math.abs(value) / most, 1) : 0;
  node.classList.toggle("hot", strength > 0 && value > 0);
  node.classList.toggle("cold", strength > 0 && value < 0);
  // From there on dark letters are read better than light ones on a dark page.
  node.classList.toggle("strong", strength > 0.5625);
  node.style.setProperty("--v", (0.12 + 0.88 * strength).toFixed(3));
}

// The floating note: what an element's `tip` says, under the pointer or at a tap.
function watchTips(box) {
  const show = (event) => {
    const node = event.target.closest?.(".t, .dot, .bar, [data-tip]");
    const words = node?.tip;
    box.hidden = !words;
    if (!words) return;
    box.textContent = words;
    const right = window.innerWidth - box.offsetWidth - 12;
    const above = event.clientY - box.offsetHeight - 14;
    box.style.left = `${Math.max(8, Math.min(event.clientX + 12, right))}px`;
    box.style.top = `${above > 8 ? above : event.clientY + 18}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => (box.hidden = true), true);
}
