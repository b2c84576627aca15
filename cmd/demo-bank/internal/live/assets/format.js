// Words and numbers, and the one table of outcomes.

const digits = new Intl.NumberFormat("en");
const minor = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });

export const $ = (id) => document.getElementById(id);
export const count = (n) => digits.format(n);
export const euros = (cents) => minor.format(cents / 100);
export const money = (cents) => euros(cents) + " EUR";
export const plural = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;

// A dot's letter, as the bank sends it, with its name, its plural if that differs, and its count.
// Colour, shape and letter show the same outcome.
export const dots = {
  e: { name: "executed", count: "executed" },
  r: { name: "replayed", count: "replayed" },
  p: { name: "in progress", count: "in_progress" },
  m: { name: "mismatch", many: "mismatches", count: "mismatch" },
  f: { name: "failed", count: "failed" },
  l: { name: "reply lost", many: "replies lost", count: "lost_replies" },
  x: { name: "request lost", many: "requests lost", count: "lost_requests" },
};

// sides lists the sides in the order of the bank's counts.
export const sides = ["protected", "unprotected"];

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// setText changes the node only if its text differs.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
