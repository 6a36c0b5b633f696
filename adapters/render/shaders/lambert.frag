#version 330 core
// colour = base colour * (ambient + (1 - ambient) intensity max(0, n . l)), n the normal turned to the camera, l the
// direction to the light.
struct Material {
    vec4 base_color_factor;
#ifdef HAS_BASE_COLOR_TEX
    sampler2D base_color_texture;
#endif
};

uniform Material material;
uniform vec3 ambient_light;
uniform vec4 light = vec4(0.0, 0.0, 0.0, 1.0);  // direction, 0 where the camera carries the light; intensity

in vec3 to_camera;
in vec3 view_normal;
#ifdef TEXCOORD_0_LOC
in vec2 uv_0;
#endif
#ifdef COLOR_0_LOC
in vec4 vertex_color;
#endif

out vec4 frag_color;

void main()
{
    vec4 base = material.base_color_factor;
#ifdef HAS_BASE_COLOR_TEX
    base *= texture(material.base_color_texture, uv_0);
#endif
#ifdef COLOR_0_LOC
    base *= vertex_color;
#endif
    vec3 n = normalize(view_normal);
    vec3 c = normalize(to_camera);
    float facing = dot(n, c);
    float cosine = light.xyz == vec3(0.0) ? abs(facing) : max(0.0, (facing < 0.0 ? -1.0 : 1.0) * dot(n, light.xyz));
    frag_color = vec4(base.rgb * (ambient_light + (1.0 - ambient_light) * light.w * cosine), base.a);
}
