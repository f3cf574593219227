// The evidence's filters: a row is shown where both agree with it.
"use strict";

{
  const place = document.getElementById("evidence"), rows = [...place.querySelectorAll("tbody tr")];
  const filters = [...place.querySelectorAll("[data-filter]")], count = place.querySelector("[data-count]");
  const filter = () => {
    for (const row of rows) row.hidden = filters.some(f => f.value && row.dataset[f.dataset.filter] !== f.value);
    count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} verdicts`;
  };
  for (const one of filters) one.addEventListener("change", filter);
  filter();
}
