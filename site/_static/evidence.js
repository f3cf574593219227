// The filters of each table of evidence: a row is shown where both agree with it.
"use strict";

for (const place of document.querySelectorAll("[data-evidence]")) {
  const rows = [...place.querySelectorAll("tbody tr")];
  const filters = [...place.querySelectorAll("[data-filter]")], count = place.querySelector("[data-count]");
  const filter = () => {
    for (const row of rows) row.hidden = filters.some(f => f.value && row.dataset[f.dataset.filter] !== f.value);
    count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} verdicts`;
  };
  for (const one of filters) one.addEventListener("change", filter);
  filter();
}
