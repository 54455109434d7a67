// Sort a table by the column whose heading was pressed; press again to turn the order round.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const table = heading.closest("table");
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.querySelectorAll("th")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const column = heading.cellIndex;
    const number = heading.classList.contains("number");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => number ? a - b : a.localeCompare(b, undefined, { numeric: true });
    const rows = [...table.tBodies[0].rows].sort((one, two) => {
      const [a, b] = [value(one), value(two)];
      if (a === "" || b === "") return (a === "") - (b === "");  // what is missing comes last
      return up ? compare(a, b) : compare(b, a);
    });
    table.tBodies[0].append(...rows);
  });
}
