"use strict";
// 1. Sort a table by the column whose heading is clicked; a second click turns the order round.
for (const button of document.querySelectorAll("table.sortable button.sort")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.querySelectorAll("th")) {
      other.setAttribute("aria-sort", "none");
    }
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    rows.sort((a, b) => compare(a.cells[column].dataset.key, b.cells[column].dataset.key));
    if (!ascending) {
      rows.reverse();
    }
    body.append(...rows);
  });
}

// Numbers come before texts, and are compared by value.
function compare(a, b) {
  const first = Number(a), second = Number(b);
  const firstIsNumber = a !== "" && !Number.isNaN(first);
  const secondIsNumber = b !== "" && !Number.isNaN(second);
  if (firstIsNumber && secondIsNumber) {
    return first - second;
  }
  if (firstIsNumber !== secondIsNumber) {
    return firstIsNumber ? -1 : 1;
  }
  return a.localeCompare(b);
}

// 2. A button that copies each piece of code.
for (const block of document.querySelectorAll("pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "copy";
  button.addEventListener("click", async () => {
    const text = block.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      // A page opened from a file may not write to the clipboard: the code is marked instead.
      const range = document.createRange();
      range.selectNodeContents(block.querySelector("code"));
      const selection = window.getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      button.textContent = "marked: press Ctrl-C";
    }
  });
  block.append(button);
}

// 3. A link to a rule opens its text.
function openRule() {
  const rule = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (rule instanceof HTMLDetailsElement) {
    rule.open = true;
    rule.scrollIntoView();
  }
}
window.addEventListener("hashchange", openRule);
openRule();
