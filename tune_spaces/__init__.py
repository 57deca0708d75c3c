"""Every search space by name. A new one is a file here and a line below."""

from tune_spaces.ablations import ATTACK, BETA, EXPERTS, RATIO
from tune_spaces.adv_moe import ADV_MOE
from tune_spaces.jtdmoe import JTDMOE
from tune_spaces.rt_er import RT_ER
from tune_spaces.space import Space
from tune_spaces.upcycled import UPCYCLED
from tune_spaces.vmoe import V_MOE

SPACES: dict[str, Space] = {
    "adv_moe": ADV_MOE,
    "upcycled": UPCYCLED,
    "rt_er": RT_ER,
    "jtdmoe": JTDMOE,
    "vmoe": V_MOE,
    "ablation_experts": EXPERTS,
    "ablation_ratio": RATIO,
    "ablation_attack": ATTACK,
    "ablation_beta": BETA,
}

__all__ = ["SPACES", "Space"]
