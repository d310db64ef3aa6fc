// Sort a table by the column whose heading is clicked, or on which Enter is pressed.
// A second click reverses the order. Empty cells come last in both orders.

function sortKey(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent;
  const number = Number(text);
  return text === "" || Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.querySelectorAll("th")];
  const body = table.tBodies[0];

  const sort = (heading, column) => {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    const rows = [...body.rows].sort((first, second) => {
      const a = sortKey(first, column);
      const b = sortKey(second, column);
      if (a === "" || b === "") return (a === "") - (b === "");
      return descending ? -compare(a, b) : compare(a, b);
    });
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...rows);
  };

  headings.forEach((heading, column) => {
    heading.tabIndex = 0;
    heading.addEventListener("click", () => sort(heading, column));
    heading.addEventListener("keydown", event => {
      if (event.key === "Enter") sort(heading, column);
    });
  });
}
