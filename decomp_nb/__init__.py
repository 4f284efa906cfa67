__version__ = "0.0.1"

# `import decomp_nb` must cost milliseconds: a name brings in its module, and torch, at its first use (PEP 562).
_homes = {
    "factors": "Factors recombine interpolate",
    "decomposer": "Decomposer load_decomposer shipped",
    "methods.lsd": "LSD",
    "methods.stable_lsd": "StableLSD",
    "methods.decomp_diffusion": "DecompDiffusion",
    "methods.disdiff": "DisDiff",
    "methods.encdiff": "EncDiff",
    "components.latent_diffusion": "LatentDiffusion",
    "methods.slot_diffusion": "SlotDiffusion",
    "methods.slate": "SLATE",
    "methods.savi": "SAVi",
    "methods.steve": "STEVE",
    "methods.slot_former": "SlotFormer",
    "methods.slot_attention_ae": "SlotAttentionAE",
    "methods.concepts": "Concepts",
    "training.trainer": "Trainer",
    "training.run_directory": "Run",
    "training.config": "TrainConfig",
    "data.catalog": "open_dataset",
    "worlds.scenes": "Scenes",
    "viz.figures": "show grid overlay strip",
    "viz.mixer": "mixer",
    "viz.web_mixer": "web_mixer",
    "official.lsd": "load_official_lsd save_official_lsd",
    "official.slot_former": "load_official_slot_former",
    "official.decomp_diffusion": "load_official_decomp_diffusion save_official_decomp_diffusion",
    "official.disdiff": "load_official_disdiff load_official_latent_diffusion",
    "official.autoencoders": "load_official_autoencoder",
    "official.concepts": "load_official_concepts",
}
_home_of = {name: home for home, names in _homes.items() for name in names.split()}
__all__ = sorted(_home_of)


def __getattr__(name):
    if name not in _home_of:
        raise AttributeError(f"module 'decomp_nb' has no attribute {name!r}")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f"decomp_nb.{_home_of[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})


# Names that have moved: old module → new module → its names, "old=new" where they were renamed.
# The old ones work for one more version.
_moved = {
    "components.slots": {"components.positions": "coordinate_grid position_projection"},
    "core": {
        "factors": "Factors recombine align interpolate to_uint8",
        "decomposer": "sample Decomposer shipped load_decomposer",
        "viz.colours": "palette",
    },
    "data.scenes": {
        "worlds.random": "SPLITS scene_keys uniform integers permutation",
        "worlds.scene_type": "Kind=SceneType draw_counts check_counts pixel_centres visible_pixels",
        "worlds.colours": "PALETTE COLORS TEXTURES BACKGROUNDS hsv_to_rgb nearest_colour draw_colors texture "
                          "draw_background render_background",
        "worlds.shapes": "SHAPES signed_distance object_distances coverage=pixel_coverage paint=composite label_map "
                         "keep_visible sample_shapes render_shapes Shapes TexturedShapes",
        "worlds.blocks": "TETROMINOES PURE BLOCK render_blocks place_apart sample_blocks Tetrominoes ToySquares",
        "worlds.raytrace": "trace=trace_rays first_hit",
        "worlds.shading": "CLEVR_COLORS SUN SUN_IRRADIANCE LOOK=MATERIALS surface_normals albedo_table "
                          "develop=tonemap glint=ggx_specular",
        "worlds.clevr": "CAMERA ZOOM SHIFT COGENT project label_clevr render_clevr place_clevr sample_clevr Clevr",
        "worlds.scenes": "KINDS VARIANTS make_kind=make_scene_type caption captions edit=edit_factors Scenes",
    },
    "data.captioned": {
        "worlds.captioned": "SCENE_SHAPES SCENE_COLORS SCENE_FACTORS CLASSES scene_words apply_style write_captions "
                            "CaptionedScenes concept_task",
        "data.class_folders": "class_folders NumberedPictures",
    },
    "data.catalog": {
        "data.catalog": "recognise=detect_format",
    },
    "data.images": {
        "data.home": "find_data",
        "data.hdf5": "open_h5 LazyH5 stored_split H5Photos",
        "data.reader": "choose=subsample split_by_group",
    },
    "data.multi_object": {
        "data.scene_item": "relabel follow_crop scene_item split_by_position clip_starts read_labels read_json",
        "data.scenes_h5": "H5Layout h5_layout count_objects H5Scenes edited_ids H5Edits",
        "data.records": "read_varint message_fields read_example masked_crc read_records RecordLayout RECORD_LAYOUTS "
                        "record_arrays records_to_h5 ObjectRecords ClevrWithMasks",
        "data.clevrtex": "clevrtex_factors ClevrTex",
        "data.movi": "MOVI_CLASSES DumpVideo dump_videos instance_factors dump_split_folders MoviDump",
    },
    "data.factors": {
        "data.arrays": "H5Images NpzImages npz_array",
        "data.shapes3d": "Shapes3D",
        "data.dsprites": "DSprites",
        "data.factor_files": "MPI3D Cars3D read_norb SmallNORB Falcor3D CelebA",
        "data.official_folders": "FOLDERS official_resize picture_reader OfficialFolder",
        "worlds.rooms": "shape_maps compose=colour_maps",
        "worlds.sprites": "spoil=corrupt",
        "data.factors": "FactorTable=FactorIndex",
    },
    "worlds.raytrace": {"worlds.raytrace": "rotate=rotate_z"},
    "worlds.scene_type": {"worlds.scene_type": "check_choice=check_option"},
    "viz.pictures": {
        "viz.sheets": "Picture",
        "viz.figures": "show grid paint overlay masked slots strip matrix Film film save_picture",
        "viz.plots": "figure plotted curve bars heat",
    },
    "convert": {
        "official.reading": "LIGHTNING rename read_weights load_strict take count_of read_flat refuse_rest "
                            "keep_with read_lightning part_of",
        "official.lsd": "SLOT_KEYS COMPUTED BESIDE POSITION_KEYS IGNORED LATER WEIGHTS check_grid "
                        "official_grid convert_lsd_slot_attention lsd_slots_config official_slots_config "
                        "unet_level official_sines check_computed table_beside convert_lsd_encoder "
                        "convert_lsd_unet effective_config lsd_encoder_config lsd_denoiser_config "
                        "read_official_part check_positions OfficialLSD read_official_lsd load_official_lsd "
                        "save_official_lsd official_config position_kind",
        "official.decomp_diffusion": "read_decomp_state decomp_sizes convert_decomp "
                                     "load_official_decomp_diffusion decomp_heads "
                                     "save_official_decomp_diffusion",
        "official.unets": "RESIDUAL_KEYS=MODULE_KEYS RES_KEYS=MODULE_KEYS",
        "official.autoencoders": "vq_config convert_vq=convert_vae convert_dvae read_vq read_dvae read_kl "
                                 "read_autoencoder load_official_autoencoder load_official_discriminator",
        "official.slots": "FAMILY_SLOT_KEYS RESNET_KEYS WRITER_KEYS=TRANSFORMER_KEYS WRITER_PARTS=TRANSFORMER_PARTS "
                          "SCHEDULE_BUFFERS "
                          "check_edge_grid take_slot_attention take_encoder convert_resnet "
                          "family_slots_config family_encoder_config ldm_unet_config=family_unet_config "
                          "convert_writer=convert_transformer convert_broadcast take_schedule load_official_slots",
        "official.disdiff": "SHIFT_KEYS FIELD_KEYS averaged latent_unet_sizes convert_latent_unet "
                            "convert_shift_decoder stored_schedule load_official_latent_diffusion "
                            "latent_space load_official_disdiff",
    },
    "viz.attribution": {
        "viz.attribution": "trace=record_attention listening_layers=text_layers",
    },
    "components.foundations": {
        "components.foundations": "spelled=token_names written_out=expand_words",
        "components.pipelines": "HubFoundation StableDiffusion StableDiffusionXL ShiftedLatents FlowSampler "
                                "StableDiffusion3 DeepFloydIF FAMILIES read_index load_part open_foundation",
        "components.picture_memory": "WordMemory picture_memory",
        "components.text_to_image": "clip_tokenizer tiny_foundation=random_pipeline",
    },
    "components.text_to_image": {
        "components.text_to_image": "clear_vae=identity_vae",
    },
    "components.codebooks": {
        "components.lpips": "PerceptualDistance VggFeatures=VGGFeatures vgg_distance",
        "components.autoencoders": "vq_model VQAutoencoder",
        "components.latents": "VQLatents build_space=build_latents",
        "components.dvae": "gumbel_softmax cosine_cooling NormedConv DVAE",
    },
    "methods.decomp_diffusion": {
        "metrics.separation": "object_shares separation recombination_accuracy",
        "components.ddim": "ClippedDDIM OfficialDDPM decomp_sampler ddim_invert",
        "components.recombination": "keep_mask check_partners decode_across swap_across",
    },
    "methods.disdiff": {
        "components.codes": "edges independent_circles code_line code_arc turned=rotate "
                            "turn_cost=circular_kl Directions=CircularCodes",
        "components.code_model": "ResidualConv FactorEncoder SplitEncoder",
        "components.shift_decoder": "TwoConditions FactorNames",
        "methods.disdiff": "Moves=DisentanglingLogits moves_of=disentangling_logits",
        "methods.encdiff": "TokenReader=TokenDenoiser",
    },
    "components.adversarial": {
        "components.autoencoders": "kl_model",
    },
    "components.latents": {
        "components.autoencoders": "draw=sample_posterior level_channels small_vae KLAutoencoder small_dc "
                                   "DCAutoencoder",
        "data.cache": "Cached cache_latents cache_features",
    },
    "components.diffusion": {
        "components.samplers": "invert",
    },
    "components.solvers": {
        "components.samplers": "straight_lines=interp ContinuousTime step_orders SinglestepSolver "
                               "CodebookDDIM=DDIM through_projection",
    },
    "components.latent_diffusion": {
        "decomposer": "mark_of=fingerprint",
        "components.samplers": "OfficialDDIM=DDIM latent_sampler",
        "components.latents": "paint=decode_latents",
        "components.plain_unets": "Look=UNetFeatures look=unet_down climb=unet_up",
    },
    "methods.concepts": {
        "methods.concept_drawing": "recipe_factors compose edit portraits=concept_samples",
        "components.words": "score_statistics",
        "components.concept_penalties": "PENALTIES",
        "components.concept_weights": "weights_of=activate raw_of=invert_activation elimination enough_words",
        "methods.concept_start": "medoids begin_at_pictures=init_from_images",
        "official.concepts": "read_official load_official_concepts save=save_concepts official_arguments "
                             "official_plan official_ddim published_folders",
    },
    "components.vectors": {
        "components.encoders": "normalisation",
        "components.unets": "build_with",
        "components.plain_unets": "TimeBeside=TimeConcat vector_denoiser "
                                  "place_channels=n_coordinate_channels "
                                  "where=coordinate_channels denoise_with=call_vector_unet "
                                  "start_at_zero=zero_start",
    },
    "components.unets": {
        "components.plain_unets": "RESAMPLE_BLOCKS VECTOR_UNET block_types check_attention zero_start "
                                  "plain_unet TimeConcat n_coordinate_channels coordinate_channels "
                                  "vector_denoiser call_vector_unet latent_unet "
                                  "UNetFeatures unet_down unet_up",
    },
    "components.denoisers": {
        "components.unets": "POSITIONS sincos_table QuickAttention PositionAttention resize_table "
                            "attention_layers note_size add_positions denoiser_config check_halvings "
                            "slot_denoiser sharpen_attention load_unet",
    },
    "components.decoders": {
        "components.decoders": "Heads=MultiHeadAttention WriterBlock=DecoderBlock "
                               "TokenWriter=AutoregressiveDecoder",
    },
    "components.encoders": {
        "components.text": "quiet_loading=quiet",
    },
    "metrics.generation": {
        "components.lpips": "VGGMaps=VGGFeatures load_lpips",
        "metrics.extractors": "damage OwnExtractor train_extractor ScriptExtractor load_extractor SceneExtractor "
                              "scene_extractor",
    },
    "metrics.disentanglement": {
        "metrics.boosting": "Split best_split halves grow_tree",
        "metrics.guessing": "BetaVAE FactorVAE",
        "metrics.attributes": "TAD tad",
    },
    "metrics.probing": {"metrics.probing": "split_by_group=split_groups"},
    "metrics.concepts": {
        "metrics.concepts": "coverage=class_shares mutual_information_score=normalized_mutual_info_score",
    },
    "official.slots": {
        "official.slots": "WRITER_KEYS=TRANSFORMER_KEYS WRITER_PARTS=TRANSFORMER_PARTS "
                          "convert_writer=convert_transformer",
    },
    "components.slot_model": {
        "components.slot_denoising": "DiffusionSlotModel call_fixed fixed_denoiser",
        "components.presets": "changed",
        "components.slot_sets": "mix_slots",
        "components.slot_model": "small_eyes=small_encoder",
    },
    "methods.lsd": {
        "methods.stable_lsd": "scheduler_of StableLSD",
        "components.slot_sets": "background_slot largest_slot changed_region repaint",
    },
    "methods.slate": {"components.token_model": "load_dvae"},
    "methods.slot_diffusion": {
        "components.slot_denoising": "judged=fixed_denoiser",
        "official.slots": "published_rate",
    },
    "data.natural": {"data.outlines": "unpack_runs mask_of_runs mask_of_polygons"},
    "training.benchmark": {"training.benchmark": "measure=measure_step"},
    "training.config": {
        "training.parameters": "check_parameters_cell",
    },
    "training.precision": {"training.precision": "time_steps=compare_steps"},
    "training.weights": {"training.weights": "fingerprint=frozen_checksums"},
    "training.trainer": {
        "training.stream": "mix=mix_seeds epoch_order micro_batch Stream seed_everything random_state set_random_state "
                           "preserve_random_state Positions=MicroBatchSampler check_data",
        "training.signals": "STOP_SIGNALS",
        "training.files": "write_text sync remove_folder checksum seal=write_manifest defect=verify_manifest",
        "training.weights": "trainable restorable save_weights load_weights fingerprint=frozen_checksums",
        "training.record": "versions git_commit difference hardware read_record check_model",
        "training.run_directory": "summary load_run",
        "training.checkpoint": "list_checkpoints",
        "training.reporting": "clock=format_duration short=format_number progress read_metrics rewind_metrics "
                              "Meter Stopwatch",
        "training.accelerator": "WAIT UNCONNECTED tracker_names fresh_accelerate connect agree_on_precision "
                                "make_accelerator gather_states",
        "training.engine": "parameter_groups make_optimizer lr_factor",
        "training.session": "make_forecast",
    },
}

# Names that are private now, by module: they work without the underscore for one more version.
_private = {
    "training.forecast": "FIRST_STEPS FIRST_SECONDS",
    "training.kernel": "FORWARDED START_TIMEOUT printed_lines execute check_started Worker wait_for tell_failure",
    "training.launch": "JOB_HELP REPEATED add_values add_run_arguments add_machine_arguments add_slurm_arguments "
                       "check_paths run_here run_job read_job check_run start_run tolerate_encodings",
    "training.parameters": "TYPES BOOLEANS NOTHING YAML_12 read_comments read_assignment union_members read_literal "
                           "first_reading is_training check_ranges yaml_loader",
    "training.precision": "trial_step fine_clock recorded_choice",
    "training.processes": "GOOD_ENDS CONSEQUENCE start_ranks send_to_all failures meet wait_for_cause conclude "
                          "join_store",
    "training.rehearsal": "SMALLER timed play report",
    "training.rendezvous": "SILENCE digest code_digest last_checkpoint wait_for_all interface_address",
    "training.slurm": "ONE_GPU SBATCH RENDEZVOUS one_word container_words task_words",
    "worlds.shading": "Lamp",
}
for _module, _names in _private.items():
    _same = _moved.setdefault(_module, {})
    _same[_module] = " ".join([_same.get(_module, ""), *(f"{name}=_{name}" for name in _names.split())])


def _new_place(module, name):
    """`("data.scenes", "paint")` → `("worlds.shapes", "composite")`, None for a name that has not moved"""
    for home, names in _moved[module].items():
        for old, _, new in (entry.partition("=") for entry in names.split()):
            if old == name:
                return home, new or old


def _old_name(module, name):
    place = _new_place(module, name)
    if place is None:
        raise AttributeError(f"module 'decomp_nb.{module}' has no attribute {name!r}")
    import warnings
    from importlib import import_module
    new = ".".join(("decomp_nb", *place))
    said = f"decomp_nb.{module}.{name} is now {new}: the next version knows that name only"
    warnings.warn(said, DeprecationWarning, stacklevel=3)
    return getattr(import_module(f"decomp_nb.{place[0]}"), place[1])


class _OldPaths:
    """Makes modules that are gone importable, and lets those that have lost names find them"""

    @staticmethod
    def find_spec(name, path=None, target=None):
        module = name.removeprefix("decomp_nb.")
        if module not in _moved:
            return None
        from importlib.machinery import ModuleSpec, PathFinder
        spec = PathFinder.find_spec(name, path) or ModuleSpec(name, _Gone())
        execute = spec.loader.exec_module

        def exec_module(loaded):
            execute(loaded)
            loaded.__getattr__ = lambda attribute: _old_name(module, attribute)
        spec.loader.exec_module = exec_module
        return spec


class _Gone:
    """Loads a module that is gone: it is empty, but for the names that `_OldPaths` finds elsewhere"""

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        names = " ".join(_moved[module.__name__.removeprefix("decomp_nb.")].values())
        module.__all__ = [entry.partition("=")[0] for entry in names.split()]


import sys  # noqa: E402

sys.meta_path.insert(0, _OldPaths)
del sys
